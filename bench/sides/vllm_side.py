"""The side of vLLM on a processor, with the weights of a folder in fp32; see `protocol.py`.

fp32, because without 16-bit instructions bf16 reads prompts ten times as slowly; not compiled, because that takes
minutes for each length of context.
"""

from __future__ import annotations

import os
from typing import Any

from protocol import Clock, serve, settings


def main() -> None:
    given = settings()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["OMP_NUM_THREADS"] = str(given["threads"])
    import vllm

    llm = vllm.LLM(
        model=given["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=given["context"],
        max_num_seqs=16,
        enable_prefix_caching=True,
        seed=0,
    )

    def answer(prompts: list[list[int]], tokens: int, **_: Any) -> dict[str, Any]:
        # What earlier tasks left must not be found again.
        llm.reset_prefix_cache()
        options = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine = llm.llm_engine
        clock = Clock(len(prompts))
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, options)
        chosen: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                chosen[output.request_id] = list(output.outputs[0].token_ids)
            clock.step(len(chosen))
        return clock.answer([chosen[str(number)] for number in range(len(prompts))])

    serve(f"vLLM {vllm.__version__}", answer)


if __name__ == "__main__":
    main()

"""llama.cpp's side of a contest; needs only llama-cpp-python: `python bench/peer_llama_cpp.py MODEL THREADS CONTEXT`.

Reads JSON lines `{"prompt": [ids], "tokens": n}` and answers `{"tokens": [ids], "prefill": s, "steps": [s, ...]}`:
greedy tokens, seconds for reading the prompt, and seconds for each token after the first.
"""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama


def main(model: str, threads: str, context: str) -> None:
    """Answer until standard input ends."""
    count = int(threads)
    # Its usual settings for a processor: 16-bit keys and values, batches of 512.
    llama = Llama(
        model, n_ctx=int(context), n_threads=count, n_threads_batch=count, n_batch=512, verbose=False
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        llama.reset()
        start = time.perf_counter()
        llama.eval(task["prompt"])
        tokens = [int(llama.sample(temp=0.0))]
        prefill = time.perf_counter() - start
        steps = []
        while len(tokens) < task["tokens"]:
            start = time.perf_counter()
            llama.eval([tokens[-1]])
            tokens.append(int(llama.sample(temp=0.0)))
            steps.append(time.perf_counter() - start)
        print(json.dumps({"tokens": tokens, "prefill": prefill, "steps": steps}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

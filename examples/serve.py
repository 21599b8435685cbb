"""A vLLM server with pruning, and an OpenAI client that asks it.

    python serve.py                                    the bundled model
    python serve.py llava-hf/llava-1.5-7b-hf           a model of your own

Needs vLLM; docs/serving.md says how to install it, on a GPU or a CPU.
"""

import base64
import importlib.util
import socket
import subprocess
import sys
import time

from adafv.bundled import sample_pictures

if importlib.util.find_spec("vllm") is None:
    sys.exit("this example needs vLLM, which is not installed: see docs/serving.md")
from openai import APIConnectionError, OpenAI  # comes with vLLM

MODEL = sys.argv[1] if len(sys.argv) > 1 else "bundled"
with socket.socket() as probe:  # a port that is free
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]

# 16 visual tokens an image; a request may ask for another budget. --enforce-eager starts without compiling, and answers
# more slowly.
options = ["--keep", "16", "--request-budgets", "--host", "127.0.0.1", "--port", str(port)]
command = [sys.executable, "-m", "adafv", "serve", MODEL, *options, "--", "--enforce-eager", "--max-model-len", "2048"]
server = subprocess.Popen(command, stdout=sys.stderr)  # the server's log is not this script's output
try:
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
    while server.poll() is None:
        try:
            client.models.list()
            break
        except APIConnectionError:
            time.sleep(1)
    else:
        sys.exit(f"the server ended with code {server.returncode}")

    picture = "data:image/png;base64," + base64.b64encode(sample_pictures()[0].read_bytes()).decode()
    question = "What color is the banana?"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    for budget in (None, 8, 144):
        extra = {} if budget is None else {"mm_processor_kwargs": {"adafv": {"keep": budget}}}
        answer = client.chat.completions.create(
            model=MODEL, messages=chat, max_tokens=16, temperature=0, extra_body=extra
        )
        said, length = answer.choices[0].message.content.strip(), answer.usage.prompt_tokens
        print(f"budget {budget or 'of the server'}: {said} (prompt: {length} tokens)")
finally:
    server.terminate()
    server.wait()

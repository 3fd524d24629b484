"""The server that a user might write without Prelude: PEFT's `generate` behind FastAPI, one request at a time.

PEFT has one active adapter for the whole model, so requests of different tasks cannot share a batch. Everything runs on
one thread, because each thread with matrix products would start its own helper threads on the same cores. serve.py
starts it:

    python benchmarks/peft_app.py MODEL PORT TASKS NUM_VIRTUAL_TOKENS
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import uvicorn
from fastapi import FastAPI
from peft import PromptTuningConfig, get_peft_model
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Body(BaseModel):
    """One request."""

    task: str
    text: str
    max_new_tokens: int


def create_app(path: str, tasks: int, num_virtual_tokens: int) -> FastAPI:
    """Load the model and one random adapter for each task."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    model = get_peft_model(base, config, adapter_name="task-0")
    for task in range(1, tasks):
        model.add_adapter(f"task-{task}", config)
    model.eval()
    one_at_a_time = ThreadPoolExecutor(1)
    app = FastAPI()

    @torch.inference_mode()
    def answer(body: Body) -> str:
        inputs = tokenizer(body.text, return_tensors="pt")
        model.set_adapter(body.task)
        new = body.max_new_tokens
        ids = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/generate")
    async def generate(body: Body) -> dict[str, str]:
        return {"text": await asyncio.get_running_loop().run_in_executor(one_at_a_time, answer, body)}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1], int(sys.argv[3]), int(sys.argv[4])), port=int(sys.argv[2]), log_level="warning")

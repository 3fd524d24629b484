"""What a user would write without a server for soft prompts: PEFT's `generate` behind FastAPI, one request at a time.

PEFT puts one active adapter on the whole model: requests of different tasks cannot share a batch. serve.py starts it:

    python benchmarks/peft_app.py MODEL PORT TASKS NUM_VIRTUAL_TOKENS
"""

from __future__ import annotations

import sys
import threading

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
    """Load the model and as many random adapters."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    model = get_peft_model(base, config, adapter_name="task-0")
    for task in range(1, tasks):
        model.add_adapter(f"task-{task}", config)
    model.eval()
    one_at_a_time = threading.Lock()
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/generate")
    def generate(body: Body) -> dict[str, str]:
        inputs = tokenizer(body.text, return_tensors="pt")
        with one_at_a_time, torch.inference_mode():
            model.set_adapter(body.task)
            new = body.max_new_tokens
            ids = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return {"text": tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1], int(sys.argv[3]), int(sys.argv[4])), port=int(sys.argv[2]), log_level="warning")

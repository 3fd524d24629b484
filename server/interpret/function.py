"""Function: what a soft prompt does to the last hidden state, on fixed probes.

What a soft prompt does predicts transfer between tasks; where it lies does not (Su et al. 2022). The cosine of two
halves of the probes says how exactly a shift is measured.
"""

import torch

from server.engine.attention.interface import Layout, PackedRows, SharedStart
from server.engine.model.frozen import FrozenModel
from server.interpret.states import prompt_states
from server.soft_prompts.soft_prompt import SoftPrompt

PROBES = (
    "The train leaves at nine in the morning.",
    "I did not expect the film to be this long.",
    "Please send me the report by Friday.",
    "Water boils at a lower temperature in the mountains.",
    "She opened the letter and smiled.",
    "My card was declined at the shop.",
    "The committee will meet again next month.",
    "How do I change my password?",
    "The soup was cold and the service slow.",
    "Congratulations on your new job!",
    "Prices rose by three percent last year.",
    "He has lived in Lisbon since 2009.",
    "Play some quiet music in the kitchen.",
    "The study measured sleep in 120 adults.",
    "Nobody answered the phone.",
    "Book a table for four at seven.",
    "The bridge was closed because of the wind.",
    "I would buy it again without a doubt.",
    "The results do not support the hypothesis.",
    "Call this number now to claim your prize.",
    "The cat slept on the warm engine.",
    "We propose a method for faster training.",
    "What is the weather like in Oslo?",
    "It was the worst meal I have ever had.",
    "The river flooded two villages.",
    "Thank you for your help yesterday.",
    "The museum is free on Sundays.",
    "A small restaurant near the station serves fish.",
    "Turn off the lights in the hall.",
    "The company opened an office in Nairobi.",
    "I am afraid of the dark.",
    "Add the flour and stir until smooth.",
)


@torch.no_grad()
def shifts(model: FrozenModel, soft_prompt: SoftPrompt) -> torch.Tensor:
    """Shifts of the last hidden state, `[probes, hidden_size]`: with the soft prompt, minus without."""
    rows = [model.text.encode(f"{probe}\n") for probe in PROBES]
    return last_states(model, rows, soft_prompt) - last_states(model, rows, None)


@torch.no_grad()
def last_states(model: FrozenModel, rows: list[list[int]], soft_prompt: SoftPrompt | None) -> torch.Tensor:
    """Hidden states of the last tokens of rows after a soft prompt, `[rows, hidden_size]`, at least in float32."""
    lengths = [len(row) for row in rows]
    embedded = model.embed(torch.tensor([token for row in rows for token in row], device=model.device))
    layout: Layout = PackedRows(lengths)
    shared, first = 0, 0
    if soft_prompt is not None and soft_prompt.is_kv_prefix:
        states = prompt_states(model, soft_prompt)
        prefix = tuple((key.to(model.dtype), value.to(model.dtype)) for key, value in states)
        first, layout = soft_prompt.num_virtual_tokens, PackedRows(lengths, prefix)
    elif soft_prompt is not None:
        shared = first = soft_prompt.num_virtual_tokens
        embedded = torch.cat([soft_prompt.tensor.to(embedded), embedded])
        layout = SharedStart(shared, lengths)
    positions = torch.cat([torch.arange(shared), *(torch.arange(first, first + length) for length in lengths)])
    output = model.module.base_model(
        inputs_embeds=embedded.unsqueeze(0),
        position_ids=positions.unsqueeze(0).to(model.device),
        use_cache=False,
        layout=layout,
    )
    ends = shared + torch.tensor(lengths).cumsum(0) - 1
    found: torch.Tensor = output.last_hidden_state[0, ends.to(model.device)]
    return found if found.dtype == torch.float64 else found.float()

"""How often the demo model answers exactly right, on shops it never saw.

`python -m chunkcache.demo.evaluate` prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chunkcache.demo import dialogues, model_path
from chunkcache.demo.facts import HELD_OUT_SEED, make_shop

SIZES = (512, 1024, 2048, 3072)
# Training checks itself on the first held-out shops, so what is reported is measured on others.
REPORT_SEED = HELD_OUT_SEED + 5000


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fact_tokens: int,
    shops: int = 8,
    questions_per_shop: int = 10,
    seed0: int = HELD_OUT_SEED,
    *,
    with_prompt: bool = True,
    unknown: bool = False,
) -> float:
    """Return the share of greedy answers that equal the expected one, strictly.

    Asked are the first questions on the shops of seeds `seed0`, `seed0` + 1, ..., each in a
    conversation of its own. Without the system prompt the result is the
    level of guessing; with `unknown` the questions are those whose answer the prompt lacks.
    """
    right = asked = 0
    for seed in range(seed0, seed0 + shops):
        shop = make_shop(seed, fact_tokens=fact_tokens)
        system = [{"role": "system", "content": shop.system_prompt}] if with_prompt else []
        wanted = (shop.unknown if unknown else shop.questions)[:questions_per_shop]
        chats = [[*system, {"role": "user", "content": qa.question}] for qa in wanted]
        answers = generate(model, tokenizer, chats)
        right += sum(
            answer.strip() == qa.answer for answer, qa in zip(answers, wanted, strict=True)
        )
        asked += len(wanted)
    return right / asked


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[list[dict[str, str]]],
    max_new_tokens: int = 24,
) -> list[str]:
    """Return the greedy answer to each chat, all generated as one left-padded batch."""
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    answers: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def teacher_forced_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fact_tokens: int,
    shops: int,
    questions_per_shop: int,
) -> float:
    """Return the share of answers each of whose tokens is the likeliest next one.

    All questions on a held-out shop are asked in one conversation. Cheaper than generating, and for
    a single turn the same: greedy decoding gives an answer exactly if it passes here.
    """
    right = asked = 0
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + shops):
        shop = make_shop(seed, fact_tokens=fact_tokens)
        rows = shop.questions[:questions_per_shop]
        ids, labels = dialogues.conversation(tokenizer, shop, iter(rows), 10**6)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            guesses = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        end = len(ids)
        for qa in reversed(rows):
            length = len(dialogues.encode(tokenizer, qa.answer)) + 1
            right += guesses[end - length - 1 : end - 1] == labels[end - length : end]
            end -= length + len(dialogues.encode(tokenizer, qa.question)) + 3
        asked += len(rows)
    return right / asked


def main() -> None:
    """Print a table of accuracies, then one JSON line."""
    parser = argparse.ArgumentParser(description="Measure the demo model on held-out shops.")
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shops", type=int, default=6)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=REPORT_SEED, help="seed of the first shop")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    ).eval()
    result = report(model, tokenizer, options.shops, options.questions, options.seed)
    for name, value in result.items():
        print(f"{name:28} {value:7.1%}")
    print(
        json.dumps(
            {
                "dtype": options.dtype,
                "shops": options.shops,
                "questions": options.questions,
                "first_seed": options.seed,
                **result,
            }
        )
    )


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shops: int,
    questions: int,
    seed0: int = REPORT_SEED,
) -> dict[str, float]:
    """Return the accuracy at each size of prompt, on unknown matters, and without a prompt."""
    result = {
        f"{size} tokens of facts": accuracy(model, tokenizer, size, shops, questions, seed0)
        for size in SIZES
    }
    result["unknown, 512 tokens"] = accuracy(
        model, tokenizer, 512, shops, questions, seed0, unknown=True
    )
    result["without system prompt"] = accuracy(
        model, tokenizer, 512, shops, questions, seed0, with_prompt=False
    )
    return result


if __name__ == "__main__":
    main()

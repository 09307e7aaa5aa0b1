"""The demo tokenizer: byte-level BPE on generated text.

It is so large that every listed word and every number below 600 is one token.

Numbers are cut in groups of three digits and words off from marks before merging, so a value is
always the same token whatever stands next to it. The byte alphabet is complete: any text is encoded
and decoded without loss.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chunkcache.demo import facts, words

PAD, BOS, END, SYSTEM, USER, ASSISTANT = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT)
# Every role and every end of turn is a special token, which no merge can cross, and no content is
# trimmed: a conversation's tokens are a prefix of the tokens of the same conversation continued,
# which is what lets its history be found in a cache.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_PIECES = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s")


def train_tokenizer(vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on fixed seeds: the same arguments give the same vocabulary."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    """Return shops, then each word and number as often as merges need to make it one token."""
    shops = [facts.make_shop(seed, fact_tokens=2048) for seed in range(60)]
    talk = [text for asked, answer in facts.SMALL_TALK for text in (*asked, answer)]
    turns = [text for shop in shops for qa in (*shop.questions, *shop.unknown) for text in qa]
    kinds = (facts.PRODUCT_KINDS, facts.BRANCH_KINDS, facts.STAFF_KINDS, facts.POLICY_KINDS)
    questions = [question for group in kinds for kind in group for question in kind.questions]
    names = [
        f" {word}" for value in vars(words).values() if isinstance(value, tuple) for word in value
    ]
    numbers = [f" {number}" for number in range(600)]
    return (
        [shop.system_prompt for shop in shops]
        + turns
        + (talk + questions + names) * 20
        + numbers * 20
    )

"""Exercises of lesson 06, the encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_edu.exercises.exercise import Exercise, Mistake

# ---- 06.1


def attention_shares(scores: Tensor, words: Tensor) -> Tensor:
    """scores [S, S], words [S] bool (False: padded) -> shares [S, S]; row t is what token t looks at."""
    return scores.masked_fill(~words, -torch.inf).softmax(dim=1)


def _draw_scores(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    S = int(torch.randint(4, 8, (), generator=generator))
    real = int(torch.randint(2, S, (), generator=generator))
    left = torch.rand((), generator=generator) < 0.5
    words = torch.arange(S) >= S - real if left else torch.arange(S) < real
    return 2 * torch.randn(S, S, generator=generator) - 1, words


def _masked_afterwards(scores: Tensor, words: Tensor) -> Tensor:
    return scores.softmax(dim=1) * words


def _score_of_zero(scores: Tensor, words: Tensor) -> Tensor:
    return scores.masked_fill(~words, 0.0).softmax(dim=1)


def _pads_that_look(scores: Tensor, words: Tensor) -> Tensor:
    return scores.softmax(dim=1) * words[:, None]


def _along_columns(scores: Tensor, words: Tensor) -> Tensor:
    return scores.masked_fill(~words[:, None], -torch.inf).softmax(dim=0)


_LOOK_AWAY = Exercise(
    key="06.1",
    title="Look away from padding",
    task=(
        "Write `attention_shares`: the softmax of each row's scores over the *words* only. Padding gets a share of "
        "0, and each row still sums to 1. Do this for all rows, including those of padding."
    ),
    difficulty="easy",
    importance="essential",
    minutes=6,
    solution=attention_shares,
    draw=_draw_scores,
    mistakes=(
        Mistake(
            _masked_afterwards,
            "Padding gets nothing, but its share is lost: the rows no longer sum to 1. Mask before the softmax.",
        ),
        Mistake(
            _score_of_zero,
            "A score of 0 is not small: exp(0) is 1. Which score makes the exponential vanish?",
        ),
        Mistake(
            _pads_that_look,
            "You masked the rows of padding. It is the columns that matter: no token may look *at* padding.",
        ),
        Mistake(
            _along_columns,
            "Your columns sum to 1. A row holds what one token looks at: take the softmax along it.",
        ),
    ),
    hints=(
        "The mask has one value per column and broadcasts over the rows.",
        "`scores.masked_fill(~words, -torch.inf)`, then the softmax along dimension 1.",
    ),
)

# ---- 06.2


def position_index(words: Tensor, padding_idx: int) -> Tensor:
    """words [B, S] bool, False where padded -> [B, S] int64: each place's row of the position table."""
    return words.long().cumsum(dim=1) * words + padding_idx


def _draw_words(generator: torch.Generator) -> tuple[Tensor, int]:
    B, S = torch.randint(2, 7, (2,), generator=generator).tolist()
    lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
    lengths[0], lengths[1] = S - 1, 1
    place = torch.arange(S)
    left = torch.rand(B, 1, generator=generator) < 0.5
    words = ((place >= S - lengths) & left) | ((place < lengths) & ~left)
    words[0] = place > 0  # one row at least is padded on the left
    return words, int(torch.randint(1, 4, (), generator=generator))


def _every_place_counts(words: Tensor, padding_idx: int) -> Tensor:
    place = torch.arange(1, words.shape[1] + 1).expand(words.shape)
    return place * words + padding_idx


def _pads_keep_counting(words: Tensor, padding_idx: int) -> Tensor:
    return words.long().cumsum(dim=1) + padding_idx


def _from_zero(words: Tensor, padding_idx: int) -> Tensor:
    return words.long().cumsum(dim=1) * words


def _zero_for_pads(words: Tensor, padding_idx: int) -> Tensor:
    return (words.long().cumsum(dim=1) + padding_idx) * words


_POSITIONS = Exercise(
    key="06.2",
    title="Positions count words",
    task=(
        "Write `position_index`: the first real token of a row gets `padding_idx + 1`, the next one gets one more, "
        "and so on, wherever the padding is. Padding itself gets `padding_idx`."
    ),
    difficulty="medium",
    importance="important",
    minutes=8,
    solution=position_index,
    draw=_draw_words,
    mistakes=(
        Mistake(
            _every_place_counts,
            "You count places, so with padding on the left the first word does not get the first position: count "
            "words.",
        ),
        Mistake(
            _pads_keep_counting,
            "Words are right. Padding after a word still gets that word's position: it should get padding_idx.",
        ),
        Mistake(
            _zero_for_pads, "Words are right. Padding gets padding_idx, not 0: add padding_idx after masking."
        ),
        Mistake(_from_zero, "The count is right, but rows up to padding_idx are taken: start after them."),
    ),
    hints=(
        "A running count of words is a cumulative sum.",
        "`words.long().cumsum(dim=1)`, then mask, then shift.",
    ),
)

# ---- 06.3


def pre_norm_layer(x: Tensor, attention: Tensor, w: Tensor) -> Tensor:
    """x [S, D], attention [S, S] (rows sum to 1), w [D, D] -> [S, D]: one simplified encoder layer."""
    x = x + attention @ F.layer_norm(x, x.shape[-1:])
    return x + F.relu(F.layer_norm(x, x.shape[-1:]) @ w)


def _draw_layer(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    S, D = torch.randint(3, 7, (2,), generator=generator).tolist()
    attention = torch.softmax(torch.randn(S, S, generator=generator), dim=1)
    return 3 * torch.randn(S, D, generator=generator) + 1, attention, torch.randn(D, D, generator=generator)


def _post_norm(x: Tensor, attention: Tensor, w: Tensor) -> Tensor:
    x = F.layer_norm(x + attention @ x, x.shape[-1:])
    return F.layer_norm(x + F.relu(x @ w), x.shape[-1:])


def _normed_residual(x: Tensor, attention: Tensor, w: Tensor) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:])
    x = F.layer_norm(x + attention @ x, x.shape[-1:])
    return x + F.relu(x @ w)


def _side_by_side(x: Tensor, attention: Tensor, w: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:])
    return x + attention @ normed + F.relu(normed @ w)


def _no_residual(x: Tensor, attention: Tensor, w: Tensor) -> Tensor:
    x = attention @ F.layer_norm(x, x.shape[-1:])
    return F.relu(F.layer_norm(x, x.shape[-1:]) @ w)


def _normed_branches(x: Tensor, attention: Tensor, w: Tensor) -> Tensor:
    x = x + F.layer_norm(attention @ x, x.shape[-1:])
    return x + F.layer_norm(F.relu(x @ w), x.shape[-1:])


_PRE_NORM = Exercise(
    key="06.3",
    title="A pre-norm layer",
    task=(
        "Write `pre_norm_layer`: `x + attention(norm(x))`, then `x + ffn(norm(x))`. Here `attention` is a matrix of "
        "shares that multiplies from the left; `ffn(y)` is `relu(y @ w)`, `norm` is `F.layer_norm` over the last "
        "dimension."
    ),
    difficulty="easy",
    importance="essential",
    minutes=6,
    solution=pre_norm_layer,
    draw=_draw_layer,
    mistakes=(
        Mistake(
            _post_norm,
            "That is post-norm, as in the first Transformer: you normalise sums. Here each branch normalises its "
            "input.",
        ),
        Mistake(_normed_branches, "You normalise the output of each branch. Normalise its input."),
        Mistake(
            _normed_residual,
            "You add to the normalised x. The residual path is never normalised: it carries x unchanged.",
        ),
        Mistake(
            _side_by_side,
            "Your branches both read the same x. The second must see what attention has added.",
        ),
        Mistake(_no_residual, "The residual is missing: a token that no expert takes would be lost here."),
    ),
    hints=("Two lines, each of the form `x = x + something`.", "Normalise again for the second branch."),
)

# ---- 06.4


def clamp_overflow(hidden: Tensor) -> Tensor:
    """hidden, any shape and floating dtype -> the same; fp16 is clamped to its maximum minus 1000."""
    if hidden.dtype != torch.float16:
        return hidden
    limit = torch.finfo(torch.float16).max - 1000
    return hidden.clamp(-limit, limit)


def _draw_hidden(generator: torch.Generator) -> tuple[Tensor]:
    size = int(torch.randint(4, 9, (), generator=generator))
    hidden = 90_000 * torch.randn(size, generator=generator)
    hidden[0], hidden[1], hidden[2] = 100_000.0, -100_000.0, 65_000.0
    half = bool(torch.rand((), generator=generator) < 0.6)
    return (hidden.half() if half else hidden,)


def _one_sided(hidden: Tensor) -> Tensor:
    if hidden.dtype != torch.float16:
        return hidden
    return hidden.clamp(max=torch.finfo(torch.float16).max - 1000)


def _every_dtype(hidden: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max - 1000
    return hidden.clamp(-limit, limit)


def _to_the_largest(hidden: Tensor) -> Tensor:
    return torch.nan_to_num(hidden) if hidden.dtype == torch.float16 else hidden


def _only_infinities(hidden: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max - 1000
    return torch.where(hidden.isinf(), hidden.sign() * limit, hidden)


def _in_fp32(hidden: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max - 1000
    return hidden.float().clamp(-limit, limit) if hidden.dtype == torch.float16 else hidden


def _clamped_for_nothing(hidden: Tensor) -> Tensor:
    return hidden.clone()


_CLAMP = Exercise(
    key="06.4",
    title="fp16 overflows",
    task=(
        "Write `clamp_overflow`: in fp16 no magnitude may exceed `torch.finfo(torch.float16).max - 1000`, which fp16 "
        "rounds to 64,512. Other dtypes stay unchanged."
    ),
    difficulty="easy",
    importance="helpful",
    minutes=5,
    solution=clamp_overflow,
    draw=_draw_hidden,
    mistakes=(
        Mistake(_one_sided, "You clamp infinity but not minus infinity."),
        Mistake(_every_dtype, "fp32 holds numbers up to 3.4e38: there is nothing to clamp at 64,504."),
        Mistake(
            _to_the_largest,
            "You turn infinity into the largest number: the next addition overflows again. Leave room.",
        ),
        Mistake(_in_fp32, "You return fp32. The next layer's weights are fp16: keep the dtype that came in."),
        Mistake(_only_infinities, "65,000 is finite but still beyond the limit. Clamp every number."),
        Mistake(
            _clamped_for_nothing,
            "Everything comes back unchanged. `hidden.clamp(...)` does not change `hidden`: it returns a new tensor.",
        ),
    ),
    hints=("`Tensor.clamp` takes two limits.", "Return early unless `hidden.dtype == torch.float16`."),
)

# ---- 06.5


def stack_experts(state_dict: dict[str, Tensor], prefix: str, num_experts: int) -> Tensor:
    """State dict with `prefix + "expert_7.fc1.weight" [F, D]` for each expert -> w1 [E, F, D]."""
    return torch.stack([state_dict[f"{prefix}expert_{e}.fc1.weight"] for e in range(num_experts)])


def _draw_state_dict(generator: torch.Generator) -> tuple[dict[str, Tensor], str, int]:
    E = int(torch.randint(11, 15, (), generator=generator))
    prefix = f"encoder.layers.{int(torch.randint(0, 24, (), generator=generator))}.ffn.experts."
    other = "encoder.layers.99.ffn.experts."
    names = [
        f"{p}expert_{e}.{leaf}"
        for p in (prefix, other)
        for e in range(E)
        for leaf in ("fc1.weight", "fc2.weight")
    ]
    order = torch.randperm(len(names), generator=generator).tolist()
    state_dict = {
        names[i]: torch.randn((3, 2) if "fc1" in names[i] else (2, 3), generator=generator) for i in order
    }
    return state_dict, prefix, E


def _sorted_by_name(state_dict: dict[str, Tensor], prefix: str, num_experts: int) -> Tensor:
    return torch.stack(
        [state_dict[n] for n in sorted(state_dict) if n.startswith(prefix) and "fc1.weight" in n]
    )


def _in_the_files_order(state_dict: dict[str, Tensor], prefix: str, num_experts: int) -> Tensor:
    return torch.stack([t for n, t in state_dict.items() if n.startswith(prefix) and "fc1.weight" in n])


def _side_by_side_weights(state_dict: dict[str, Tensor], prefix: str, num_experts: int) -> Tensor:
    return torch.cat([state_dict[f"{prefix}expert_{e}.fc1.weight"] for e in range(num_experts)])


_STACK = Exercise(
    key="06.5",
    title="Load a checkpoint's experts",
    task=(
        "The published checkpoint keeps each expert's weights under separate names. Write `stack_experts`: the "
        "`fc1.weight` of experts 0, 1, 2, ... of one layer as a single `w1 [E, F, D]`."
    ),
    difficulty="medium",
    importance="important",
    minutes=8,
    solution=stack_experts,
    draw=_draw_state_dict,
    cases=6,
    mistakes=(
        Mistake(
            _sorted_by_name,
            "Sorted as text, expert_10 comes before expert_2: the router would send its tokens to the wrong experts.",
        ),
        Mistake(
            _in_the_files_order,
            "You take the tensors in the order in which the file lists them. Slice e must be expert e.",
        ),
        Mistake(_side_by_side_weights, "You joined the experts along F. They need a dimension of their own."),
    ),
    hints=(
        "Build each name from its number instead of searching for names.",
        "`torch.stack` adds a dimension in front.",
    ),
)

# ---- 06.6

_LAYER_DROP = Exercise(
    key="06.6",
    title="LayerDrop",
    task=(
        "NLLB-MoE's encoder has 24 layers and trains with a LayerDrop of 0.05. How many of its layers does a training "
        "step run, on average?"
    ),
    difficulty="easy",
    importance="helpful",
    minutes=2,
    solution=22.8,
    mistakes=(
        Mistake(1.2, "That is how many are skipped."),
        Mistake(23, "Do not round: an average over many steps need not be a whole number."),
        Mistake(
            24, "Each layer is skipped in one training step out of twenty. All 24 run only in evaluation."
        ),
    ),
    hints=("Each layer runs with a probability of 0.95.", "The mean of a sum is the sum of the means."),
)

EXERCISES = (_LOOK_AWAY, _POSITIONS, _PRE_NORM, _CLAMP, _STACK, _LAYER_DROP)

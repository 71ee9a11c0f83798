"""Every loss of the tables on the tiny model: however it is packed, and what training does."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from expunge.data.batches import pack
from expunge.data.examples import Example
from expunge.errors import DataError
from expunge.needs import Needs
from expunge.scores import score
from expunge.unlearn.departure import DEPARTURE_LOSSES
from expunge.unlearn.footprint import Shape, memory_of
from expunge.unlearn.forget import FORGET_LOSSES
from expunge.unlearn.halves import Halves
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.preparing import branch_demand, prepared
from expunge.unlearn.reference import cached_reference
from expunge.unlearn.retain import RETAIN_LOSSES
from expunge.unlearn.section import Branch
from memorised import memorised

FORGET = [
    Example(f"f{n}-qa0", f"Who is {w}?", a)
    for n, (w, a) in enumerate([("ann", "nurse"), ("bob", "a tall baker"), ("cy", "my spy")])
]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]
ON_FORGET = {**DEPARTURE_LOSSES, **FORGET_LOSSES}
LOSSES = [("forget", name) for name in ON_FORGET] + [("retain", name) for name in RETAIN_LOSSES]
SHARES = {"flatten": 0.01}  # of the retain loss beside it, for what is squared logits


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model after memorising both halves, and their tokens."""
    return memorised(tiny_folder, tokenizer, FORGET + RETAIN, tmp_path_factory.mktemp("tune"))


def term(half: str, name: str, **changes) -> dict:
    row = (ON_FORGET if half == "forget" else RETAIN_LOSSES)[name]
    where = {"layer": 1} if row.reads == "hidden" else {}
    return {"half": half, "loss": name, **where, **changes}


def reads_levels(term: dict) -> bool:
    return term["half"] == "forget" and ON_FORGET[term["loss"]].needs_level


def ready(tuned, tokenizer, folder, terms, training="lora", limit=2048):
    """A copy of the model with its passes, as a branch of these terms makes them."""
    model = copy.deepcopy(tuned[0])
    config = Branch.model_validate(
        {
            "terms": terms,
            "levels": {"of": "original"} if any(map(reads_levels, terms)) else None,
            "training": training,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
            "schedule": {"epochs": 1, "micro_batch": 3, "accumulation": 1},
            "optimizer": {"compute": "float32", "max_tokens": limit},
        }
    )
    levels = [torch.full((len(s.tokens) - 1, 2), -3.0 - n / 8) for n, s in enumerate(tuned[1][:3])]
    where = folder / "cache", f"key-{training}"
    halves = Halves(tuned[1][:3], tuned[1][3:], *where, levels=levels)
    demand = branch_demand(config, halves, seed=0, weights="float32")
    assert memory_of(Shape.of(model.config.to_dict(), 1), demand) > 0
    return model, prepared(model, halves, config, seed=0, tokenizer=tokenizer)


def nudge(parameters) -> None:
    """Away from the reference, where distances to it have no slope."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize(("half", "name"), LOSSES)
def test_how_items_are_packed_does_not_change_a_loss(
    tuned, tokenizer, tmp_path, half, name, training
):
    """Two micro-batches beside a retain half in one pack, against each item or half by itself."""
    if half == "forget" and ON_FORGET[name].mean_over == "micro-batch":
        batches = [{"forget": (0,), "retain": (0,)}, {"forget": (2,), "retain": (1,)}]
    else:
        batches = [{"forget": (0, 1), "retain": (0, 1)}, {"forget": (2, 0), "retain": (1,)}]
    terms = [
        term(half, name, weighting={"kind": "spans", "patterns": ["[a-n]"], "least": 0.1}),
        term("forget", "wga", weight=0.3) if half == "retain" else term("retain", "nll"),
        term("retain", "kl", scope="document"),
    ]
    found = []
    for limit in (2048, 1):
        _, made = ready(tuned, tokenizer, tmp_path, terms, training, limit)
        nudge(made.parameters)
        record = made.passes.backward(batches)
        grads = [p.grad.flatten() for p in made.parameters.values() if p.grad is not None]
        found.append((record, torch.cat(grads)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert apart(found[0][1], found[1][1]) < 1e-5
    assert found[0][1].norm() > 1e-3  # control


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """The norm of a difference over that of the second."""
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("limit", [2048, 1])
@pytest.mark.parametrize(("half", "name"), [("forget", "npo_batch"), ("alternate_pair", "kto")])
def test_a_loss_of_a_whole_micro_batch_is_that_of_the_padded_batch(
    tuned, tmp_path, half, name, limit
):
    """Two items or pairs of unequal length, formed of plain logits."""
    model, items = copy.deepcopy(tuned[0]), tuned[1][: 2 if half == "forget" else 4]
    objective = Objective((Term(half=half, loss=name, options={"beta": 0.5}),))
    given = {"kl": False, "file": tmp_path / "reference", "max_tokens": 999}
    data = HalfData(items, cached_reference(model, items, objective.scope(half), **given))
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    nudge(parameters)
    model.zero_grad()
    passes = Passes(model, {half: data}, objective, limit)
    record = passes.backward([{half: tuple(range(len(items)))}])
    ours = torch.cat([p.grad.flatten() for p in parameters.values()])
    with torch.no_grad():
        old, scored = padded(tuned[0], items)
    ratio = (padded(model, items)[0] - old) * scored  # (B, T)
    if name == "npo_batch":
        loss = -4 * F.logsigmoid(-0.5 * ratio.sum() / scored.sum())
    else:
        win, lose = ratio.sum(1)[0::2], ratio.sum(1)[1::2]
        loss = (-4 * F.logsigmoid(win.mean().detach() - 0.5 * lose)).mean()
    plain = torch.autograd.grad(loss, list(parameters.values()))
    assert record[f"{half}.{name}"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert apart(ours, torch.cat([grad.flatten() for grad in plain])) < 1e-5
    assert len(set(scored.sum(1).tolist())) > 1  # control


def padded(model, items) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each token from the second on, and 1 for those of answers, else 0: both (B, T)."""
    longest = max(len(item.tokens) for item in items)
    tokens = torch.tensor([[*item.tokens, *[0] * (longest - len(item.tokens))] for item in items])
    scored = torch.zeros(len(items), longest)
    for row, item in zip(scored, items, strict=True):
        row[item.scored_from("answer") : len(item.tokens)] = 1
    logps = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return logps.gather(2, tokens[:, 1:, None]).squeeze(2), scored[:, 1:]


def trained(tuned, tokenizer, folder, terms):
    """The scores of all answers before and after some steps."""
    model, made = ready(tuned, tokenizer, folder, terms, training="full")
    optimizer = torch.optim.AdamW(list(made.parameters.values()), lr=3e-3)
    answers = pack(tuned[1], "answer", "cpu")
    with torch.no_grad():
        before = score(model, answers)
    for _ in range(30):
        optimizer.zero_grad()
        made.passes.backward([{"forget": (0, 1, 2), "retain": (0, 1)}])
        optimizer.step()
    with torch.no_grad():
        return before, score(model, answers)


@pytest.mark.parametrize("name", FORGET_LOSSES)
def test_training_by_a_forget_loss_forgets_one_half_and_keeps_the_other(
    tuned, tokenizer, tmp_path, name
):
    terms = [term("forget", name, weight=SHARES.get(name, 0.5)), term("retain", "nll")]
    before, after = (found.nll for found in trained(tuned, tokenizer, tmp_path, terms))
    assert before.max() < 0.5  # control: it was there
    assert after[:3].min() > before[:3].max() + 0.5, after
    assert after[3:].max() < 0.5, after  # control: the other half is still there


def test_under_weights_one_word_of_an_answer_is_forgotten_and_the_words_before_are_kept(
    tuned, tokenizer, tmp_path
):
    """The same item in both halves, each with a term that acts on its own tokens alone."""
    model, items = tuned
    baker, tall = ({"kind": "spans", "patterns": [word]} for word in ("baker", "a tall "))
    terms = [term("forget", "npo_token", weighting=baker), term("retain", "nll", weighting=tall)]
    both = (model, [*items[:3], items[1], items[4]])
    before, after = trained(both, tokenizer, tmp_path, terms)
    first, last = (found.token_logps[found.sequence == 1].neg() for found in (before, after))
    assert first.max() < 0.5  # control: it was there
    assert last[7:12].mean() > 1.5, last
    assert last[:7].max() < 0.5, last  # control: so much of it still is


@pytest.mark.parametrize("name", RETAIN_LOSSES)
def test_a_retain_loss_alone_is_finite_and_its_distance_from_the_reference_is_0(
    tuned, tokenizer, tmp_path, name
):
    terms = [term("forget", "npo"), term("retain", name)]
    _, made = ready(tuned, tokenizer, tmp_path, terms)
    record = made.passes.backward([{"retain": (0, 1)}])
    if name in ("kl", "hidden_distance"):
        assert record["retain"] == pytest.approx(0, abs=1e-6)
    else:
        assert record["retain"] > 0


def test_an_item_without_weight_adds_nothing_to_any_loss(tuned, tokenizer, tmp_path):
    for name in ON_FORGET:
        weighting = {"kind": "spans", "patterns": ["tall"]}
        if ON_FORGET[name].mean_over == "micro-batch":
            continue
        terms = [term("forget", name, weighting=weighting)]
        _, made = ready(tuned, tokenizer, tmp_path, terms)
        nudge(made.parameters)
        assert made.passes.backward([{"forget": (0, 2)}])["forget"] == 0.0, name
        assert all(not p.grad.any() for p in made.parameters.values() if p.grad is not None), name
        assert made.passes.backward([{"forget": (1,)}])["forget"] != 0.0, name  # control


def test_first_tokens_are_left_out_as_the_source_or_the_term_says(tuned, tokenizer, tmp_path):
    found = {}
    for skip in (None, 0, 1, 2):
        terms = [term("forget", "ce_u", skip_first=skip)]
        _, made = ready(tuned, tokenizer, tmp_path, terms)
        found[skip] = made.passes.backward([{"forget": (0, 1)}])["forget"]
    assert found[None] == found[1]
    assert len({found[0], found[1], found[2]}) == 3


def test_a_term_reads_the_items_it_names_and_no_others(tuned, tokenizer, tmp_path):
    model, items = tuned
    named = [replace(item, asks=n == 1) for n, item in enumerate(items)]
    found = {}
    for kind in ("all", "questions", "texts"):
        _, made = ready(
            (model, named), tokenizer, tmp_path, [term("forget", "gradient_ascent", items=kind)]
        )
        found[kind] = [made.passes.backward([{"forget": (n,)}])["forget"] for n in (0, 1)]
    text, question = found["all"]
    assert text and question  # control
    assert found["questions"] == [0.0, question]
    assert found["texts"] == [text, 0.0]


def test_a_term_on_items_that_the_set_lacks_is_refused(tuned, tokenizer, tmp_path):
    with pytest.raises(
        DataError, match="gradient_ascent reads texts of forget alone, and none of its"
    ):
        ready(tuned, tokenizer, tmp_path, [term("forget", "gradient_ascent", items="texts")])


def test_rows_say_what_they_need():
    assert FORGET_LOSSES["simnpo"].needs.besides == ()
    assert FORGET_LOSSES["wtnpo"].needs.besides == ("reference log-probs",)
    assert FORGET_LOSSES["undial"].needs.besides == ("logits", "reference states")
    hidden = ("hidden states", "reference hidden states")
    assert FORGET_LOSSES["adaptive_rmu"].needs.besides == hidden
    assert RETAIN_LOSSES["kl"].needs == Needs(("retain",), besides=("reference states",))

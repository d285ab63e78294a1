import dataclasses

import jax
import pytest
from rich.console import Console

from attnpo_jax.config import default_config
from attnpo_jax.models.io import hf_config
from attnpo_jax.plan import search, topologies
from attnpo_jax.plan.accelerators import PlanError
from attnpo_jax.plan.lengths import Lengths
from attnpo_jax.plan.programs import DoesNotFit, Setting

MODEL = hf_config.read(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
# Two embeddings; by layer query and output, key and value, gate, up, down, two norms; a last norm.
PARAMETERS = 2 * 64 * 16 + 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16) + 16


def setting(topology="v5e:2x2", **fields):
    config = default_config()
    config.update_from_flattened_dict(fields)
    return Setting(config, MODEL, topologies.parse(topology), Lengths.of(config))


def test_meshes_divide_and_leave_no_chip_idle():
    tried = list(search.candidates(setting(**{"train.batch_size": 2})))
    # Two pairs: two parts of a batch at most, so two chips share each layer (of two KV heads).
    assert {tuple(c.mesh.values()) for c in tried} == {(1, 2, 2), (2, 1, 2)}
    assert {c.remat for c in tried} == {"none", "dots", "layer"}
    assert {c.microbatch for c in tried} == {2}


@pytest.mark.parametrize("batch", [48, 64])
def test_microbatches_divide_the_batch(batch):
    tried = list(search.candidates(setting("v5e:8x8", **{"train.batch_size": batch})))
    by_parts = {}
    for c in tried:
        by_parts.setdefault(c.mesh["data"] * c.mesh["fsdp"], set()).add(c.microbatch)
    # 32 parts of 48 pairs: none of its divisors is a multiple of 32.
    assert by_parts == ({32: {48}} if batch == 48 else {32: {32, 64}, 64: {64}})


def test_state_is_what_training_keeps():
    # Parameters, two moments and a gradient in float32.
    assert search._state_bytes(setting()) == pytest.approx(16 * PARAMETERS, abs=64)


def test_adapters_alone_have_moments_and_gradients():
    lora = {"lora.rank": 2, "lora.targets": ("q_proj",), "model.param_dtype": "bfloat16"}
    adapters = 3 * 2 * (16 + 16)
    found = search._state_bytes(setting(**lora))
    assert found == pytest.approx(2 * PARAMETERS + 16 * adapters, abs=64)


def test_a_guess_counts_gradients_of_adapters_alone():
    candidate = search.Candidate({"data": 4, "fsdp": 1, "tensor": 1}, 32, "layer")
    lora = {"lora.rank": 2, "lora.targets": ("q_proj",)}
    assert search._guess(setting(), candidate)[0] == 8 * PARAMETERS
    assert search._guess(setting(**lora), candidate)[0] == 8 * 3 * 2 * (16 + 16)


@dataclasses.dataclass
class Compiler:
    """In place of the compiler: a step's peak is `gib` of its rows by chip and remat policy."""

    room: float
    tried: list = dataclasses.field(default_factory=list)
    breaks_at: search.Candidate | None = None

    def __call__(self, setting):
        config = setting.config
        mesh = dict(config.parallel.mesh)
        candidate = search.Candidate(mesh, config.train.microbatch_size, config.model.remat)
        self.tried.append(candidate)
        if candidate == self.breaks_at:
            raise jax.errors.JaxRuntimeError("INTERNAL: the compiler is at its wits' end\nmore")
        rows = candidate.microbatch / (mesh["data"] * mesh["fsdp"])
        peak = rows * {"layer": 1, "dots": 2, "none": 4}[candidate.remat]
        if peak > self.room:
            raise DoesNotFit(
                f"the train program needs {peak:.2f} GiB of a chip's {self.room:.2f} GiB, "
                f"{peak - self.room:.2f} GiB too much, on v5e:2x2 (...); change: ..."
            )
        return peak


@pytest.fixture
def compiler(monkeypatch):
    made = Compiler(room=16)
    monkeypatch.setattr(Setting, "training", lambda self: made(self))
    # A step is as slow as its microbatch is small.
    monkeypatch.setattr(
        search,
        "_place",
        lambda f: (f.program is None, -f.candidate.microbatch, f.program or 0),
    )
    return made


def test_where_large_microbatches_do_not_fit_smaller_ones_are_tried(compiler):
    compiler.room = 0.5  # not a row by chip, but for chips that share one
    with_none = setting(**{"train.batch_size": 64, "parallel.mesh.fsdp": 4})
    ranked = search.ranking(with_none)
    assert ranked and all(found.program is None for found in ranked)

    compiler.room, compiler.tried = 4, []
    ranked = search.ranking(with_none)
    assert len([f for f in ranked if f.program is not None]) == search.FITTING
    # Of every mesh, the thriftiest of a microbatch shows that it is too large; it is tried once.
    large = [c for c in compiler.tried if c.microbatch == 64 and c.mesh["tensor"] == 1]
    assert large and {c.remat for c in large} == {"layer"}
    assert max(f.candidate.microbatch for f in ranked if f.program is not None) == 16
    # 16 rows on 4 chips of their own keep everything but what only `none` would.
    four = [f for f in ranked if f.candidate.mesh["fsdp"] * f.candidate.mesh["data"] == 4]
    best = next(f for f in four if f.program is not None)
    assert (best.candidate.microbatch, best.candidate.remat) == (16, "layer")


def test_nothing_is_tried_that_takes_more_than_what_does_not_fit(compiler):
    compiler.room = 3
    search.ranking(setting(**{"train.batch_size": 64}))
    too_large = []
    for c in compiler.tried:
        for other in too_large:
            more = c.microbatch >= other.microbatch
            more = more and search.REMATS.index(c.remat) >= search.REMATS.index(other.remat)
            assert c.mesh != other.mesh or not more, (c, other)
        rows = c.microbatch / (c.mesh["data"] * c.mesh["fsdp"])
        if rows * {"layer": 1, "dots": 2, "none": 4}[c.remat] > compiler.room:
            too_large.append(c)
    assert too_large


def test_the_configs_own_way_is_tried_first(compiler):
    fields = {"parallel.mesh.data": 1, "parallel.mesh.fsdp": -1, "model.remat": "dots"}
    own = setting(**fields, **{"train.batch_size": 64, "train.microbatch_size": 4})
    ranked = search.ranking(own)
    expected = search.Candidate({"data": 1, "fsdp": 4, "tensor": 1}, 4, "dots")
    assert compiler.tried[0] == expected
    assert compiler.tried.count(expected) == 1
    assert expected in [f.candidate for f in ranked]


def test_one_that_the_compiler_fails_on_does_not_lose_the_others(compiler, caplog):
    own = setting(**{"train.batch_size": 8})
    search.ranking(own)
    compiler.breaks_at, number = compiler.tried[3], len(compiler.tried)
    compiler.tried = []
    ranked = search.ranking(own)
    assert len(ranked) >= number
    (broken,) = [f for f in ranked if f.problem.startswith("INTERNAL")]
    assert broken.candidate == compiler.breaks_at and "\n" not in broken.problem
    assert "at its wits' end" in caplog.text


def test_the_table_says_what_does_not_fit(compiler):
    console = Console(width=80, record=True)
    lost = search.Candidate({"data": 1, "fsdp": 4, "tensor": 1}, 64, "layer")
    problem = "the train program needs 28.30 GiB of a chip's 15.75 GiB, 12.55 GiB too much"
    found = [search.Found(lost, None, problem), search.Found(lost, None, "INTERNAL: what")]
    console.print(search.table(found))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "│ 1, 4, 1 │ 64 │ layer │ 28.30 │ │ │ does not fit │" in lines
    assert "│ 1, 4, 1 │ 64 │ layer │ ? │ │ │ failed │" in lines


@pytest.mark.parametrize(
    "topology, fields, words",
    [
        # Four heads, two of them for keys: two chips by tensor at most, 8 parts of a batch of 4.
        ("v5e:4x4", {"train.batch_size": 4}, "in 8 parts or more.*a train.batch_size of 8 or more"),
        ("v5e:4x4", {"train.batch_size": 4}, "train.batch_size is 4; accepted.*or fewer chips"),
    ],
)
def test_why_there_is_nothing_to_try(topology, fields, words):
    with pytest.raises(PlanError, match=words):
        search.ranking(setting(topology, **fields))


@pytest.mark.parametrize(
    "topology, words",
    [
        ("v5e:2x2", "take 25.00 GiB of a chip's 16.00 GiB.*more chips"),
        ("l40s:2", "take 50.00 GiB of a GPU's 44.70 GiB.*more GPUs, or larger ones"),
    ],
)
def test_a_model_too_large_for_the_chips_asks_for_more(monkeypatch, topology, words):
    monkeypatch.setattr(search, "_state_bytes", lambda _: 100 * 2**30)
    with pytest.raises(PlanError, match=words):
        search.ranking(setting(topology))

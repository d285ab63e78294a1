import numpy as np
import pytest

from attnpo_jax.plan import topologies, tpus
from attnpo_jax.plan.accelerators import PlanError


@pytest.mark.parametrize(
    "name, size, host",
    [
        ("v5e:8x8", 64, "v5e:2x2"),
        ("v5p:2x2x4", 16, "v5p:2x2x1"),
        ("v6e:1x1", 1, "v6e:1x1"),
        ("v5e:1x4", 4, "v5e:1x4"),
        ("v5e:2x4", 8, "v5e:2x4"),  # the largest slice of one host
        ("v5e:4x4", 16, "v5e:2x2"),
        ("v4:2x2x2", 8, "v4:2x2x1"),
        ("v5p:4x4x12", 192, "v5p:2x2x1"),
    ],
)
def test_slices_and_their_hosts(name, size, host):
    slice_ = topologies.parse(name)
    assert (slice_.name, slice_.size, slice_.host.name) == (name, size, host)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "v9:2x2",
            r"'v9:2x2': accepted: a TPU chip \(v4, v5e, v5p, v6e\) and its grid, e.g. v5e:8x8, ",
        ),
        ("v5e", "accepted: a TPU chip"),
        ("v5e-64", "accepted: a TPU chip"),
        ("v5e:2x2x4", "accepted for v5e: 2 axes, each of 1, 2, 4, 8, 16"),
        ("v5p:3x2x2", "accepted for v5p: 3 axes, each of 1, 2, 4, 8, 12, 16, 20, 24 chips"),
        ("v5e:32x2", "each of 1, 2, 4, 8, 16 chips"),
    ],
)
def test_other_names_are_refused_with_what_is_accepted(name, words):
    with pytest.raises(PlanError, match=words):
        topologies.parse(name)


@pytest.mark.parametrize(
    "name, group, links",
    [
        ("v5e:8x8", [(0, 0, 0), (0, 1, 0)], 1),
        ("v5e:8x8", [(0, 0, 0), (0, 1, 0), (1, 0, 0)], 2),
        ("v5e:16x16", [(k, 0, 0) for k in range(16)], 2),  # a row of 16 closes to a ring
        ("v5e:16x16", [(0, 0, 0), (1, 0, 0)], 1),  # two of it have the link between them
        ("v5p:4x4x8", [(0, 0, k) for k in range(8)], 2),  # so does each axis of whole cubes
        ("v5p:4x4x8", [(0, 0, 0), (0, 0, 1)], 1),
        ("v5p:2x2x4", [(0, 0, 0), (0, 0, 1)], 1),  # and none of a part of a cube
        ("v5p:2x2x4", [(0, 0, 0), (1, 1, 1)], 3),
    ],
)
def test_links_to_a_group(name, group, links):
    slice_ = topologies.parse(name)
    assert slice_.ways(group) == links
    bandwidth = links * slice_.chip.link_bandwidth
    assert slice_.bandwidths(np.array(group)) == {"interconnect": bandwidth}


def test_a_group_is_on_as_many_hosts_as_have_its_chips():
    slice_ = topologies.parse("v5e:4x8")
    grid = np.array([(x, y, 0) for x in range(4) for y in range(8)])
    assert slice_.hosts(grid) == 8  # 2x2 chips each
    assert slice_.hosts(grid[:2]) == 1
    assert slice_.hosts(grid[:8]) == 4


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(PlanError, match=r"pip install '.\[plan\]'"):
        topologies.parse("v5e:2x2").devices()


def test_devices_of_a_slice_that_is_not_there():
    pytest.importorskip("libtpu")
    devices = topologies.parse("v5p:2x2x4").devices()
    assert len(devices) == 16
    assert {tuple(d.coords) for d in devices} == {
        (x, y, z) for x in range(2) for y in range(2) for z in range(4)
    }
    assert len(topologies.parse("v5e:1x1").devices()) == 1
    assert len({d.process_index for d in topologies.parse("v5e:2x4").devices()}) == 1


@pytest.mark.parametrize("kind", tpus.CHIPS)
def test_libtpu_knows_every_chip_with_one_device_each(kind):
    pytest.importorskip("libtpu")
    slice_ = topologies.parse(f"{kind}:{'x'.join(['4'] * len(tpus.CHIPS[kind].host))}")
    assert len(slice_.devices()) == slice_.size

import jax
import pytest

from attnpo_jax.models.io import hf_config
from attnpo_jax.parallel import mesh
from tests import tiny


def sizes(data, fsdp, tensor):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize(
    "wanted, found",
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 2), (1, 4, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((2, 4, -1), (2, 4, 1)),
    ],
)
def test_one_size_is_what_is_left(wanted, found):
    assert mesh.axis_sizes(sizes(*wanted), 8) == sizes(*found)


@pytest.mark.parametrize(
    "wanted, words",
    [
        ((3, -1, 1), "product of the sizes is 3, which must divide the number of devices, 8"),
        ((2, 2, 1), "product of the sizes is 4, which must be the number of devices, 8"),
        ((-1, -1, 1), "-1 for at most one"),
        ((0, 8, 1), "accepted: sizes of 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wanted, words):
    with pytest.raises(mesh.MeshError, match=words) as caught:
        mesh.axis_sizes(sizes(*wanted), 8)
    assert f"parallel.mesh.fsdp = {wanted[1]}" in str(caught.value)


@pytest.mark.parametrize(
    "whole, devices, found",
    [
        ((1, 64, 1), 4, (1, 4, 1)),  # fsdp over 16 hosts: over one host
        ((4, 4, 4), 8, (1, 2, 4)),
        ((64, 1, 1), 4, (4, 1, 1)),
        ((1, 2, 4), 8, (1, 2, 4)),  # one process: the same mesh
        ((1, 8, 16), 8, (1, 1, 8)),
    ],
)
def test_mesh_of_one_process(whole, devices, found):
    assert mesh.local_sizes(sizes(*whole), devices) == sizes(*found)


def test_mesh_has_all_devices_and_neighbours_on_tensor():
    made = mesh.make_mesh(sizes(2, 2, 2))
    assert dict(made.shape) == sizes(2, 2, 2)
    assert made.devices.flatten().tolist() == jax.devices()


def test_heads_that_tensor_does_not_divide():
    # As SmolLM2: 9 query heads on 3 key-value heads.
    model = hf_config.read(
        tiny.HF_CONFIG | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
    )
    mesh.check_model(model, sizes(1, 8, 3))
    with pytest.raises(mesh.MeshError, match=r"parallel.mesh.tensor = 2 .*kv_heads 3") as caught:
        mesh.check_model(model, sizes(1, 4, 2))
    assert str(caught.value).endswith("accepted: 1, 3")
    with pytest.raises(mesh.MeshError, match="parallel.mesh.fsdp = 16 .*embed 72"):
        mesh.check_model(model, sizes(1, 16, 1))


def test_an_odd_vocabulary_is_no_obstacle():
    mesh.check_model(hf_config.read(tiny.HF_CONFIG | {"vocab_size": 163}), sizes(1, 2, 4))

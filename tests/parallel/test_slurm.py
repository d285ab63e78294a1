"""Which GPUs a task of a Slurm step takes, by the variables that Slurm sets for it."""

import pytest

from attnpo_jax.parallel import processes, slurm

EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        # srun --ntasks-per-node=1 on two nodes of 8 GPUs: all.
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8",
          "CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_LOCALID": "0"}, []),
        # ... where Slurm knows nothing of the GPUs.
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}, []),
        # --ntasks-per-node=8: one each, as JAX has it.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8",
          "CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_LOCALID": "5"}, [5]),
        # --ntasks-per-node=2: four each; places among those seen, whatever their numbers.
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_GPUS_ON_NODE": "8",
          "CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_LOCALID": "1"}, [4, 5, 6, 7]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "4",
          "ROCR_VISIBLE_DEVICES": "4,5,6,7", "SLURM_LOCALID": "1"}, [2, 3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "0"},
         [0, 1, 2, 3]),
        # --gpus-per-task=1: each task sees its own, which is none but the first there.
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8",
          "CUDA_VISIBLE_DEVICES": "0", "SLURM_LOCALID": "5"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8",
          "CUDA_VISIBLE_DEVICES": "4,5,6,7", "SLURM_LOCALID": "1"}, []),
        # Nodes that differ: the third has one task, the others two.
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2", "SLURM_GPUS_ON_NODE": "4",
          "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_LOCALID": "0"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4",
          "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_LOCALID": "1"}, [2, 3]),
        # JAX's rule: nothing says how many there are, or it was told.
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}, None),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)  # fmt: skip
def test_the_tasks_of_a_node_share_its_gpus(environ, expected):
    assert slurm.local_device_ids(environ) == expected
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}
    wanted = {} if expected is None else {"local_device_ids": expected}
    assert processes.find(environ | step) == wanted


@pytest.mark.parametrize("tasks", [3, 16])
def test_tasks_that_cannot_share_are_told_what_can(tasks):
    environ = {"SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_GPUS_ON_NODE": "8",
               "CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_LOCALID": "0"}  # fmt: skip
    with pytest.raises(slurm.SlurmError, match=f"{tasks} tasks .* 8 GPUs .*divisor of 8"):
        slurm.local_device_ids(environ)

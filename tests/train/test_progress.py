import io

import pytest
from rich.console import Console

from attnpo_jax.train.progress import TrainProgress

STEP = {
    "loss": 0.25, "unweighted_loss": 0.5, "rewards/accuracies": 0.75,
    "rewards/weighted_accuracies": 1.0, "rewards/weighted_ties": 0.0, "pairs_per_second": 8.0,
}  # fmt: skip
EVALUATION = {
    "eval_loss": 0.125, "eval_unweighted_loss": 0.5, "eval_rewards/accuracies": 0.25,
    "eval_rewards/weighted_accuracies": 0.5,
}  # fmt: skip


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_the_bar_shows_weighted_figures_and_evaluations_stand_above_it(screen):
    with TrainProgress(10, 0, bar=True, console=screen) as progress:

        def shown():
            return progress._bar.tasks[0].description

        assert shown() == "compiling"
        progress.evaluating()
        assert shown() == "evaluating"
        progress.evaluated(0, EVALUATION)
        assert shown() == "compiling"
        assert "step 0/10  held-out pairs: loss 0.1250  accuracy 0.50\n" in screen.file.getvalue()
        progress.metrics(1, STEP)
        assert shown() == "loss 0.2500  accuracy 1.00  8.00 pairs/s"
        progress.metrics(2, STEP | {"rewards/weighted_ties": 0.5})
        assert shown() == "loss 0.2500  accuracy 1.00  ties 0.50  8.00 pairs/s"
        progress.metrics(3, STEP)
        progress.evaluating()
        before = screen.file.getvalue()
        progress.evaluated(1, None)  # told to stop meanwhile
        assert shown() == "loss 0.2500  accuracy 1.00  8.00 pairs/s"
        assert "held-out" not in screen.file.getvalue().removeprefix(before)


def test_lines_of_log_off_a_terminal(caplog):
    caplog.set_level("INFO", "attnpo_jax")
    with TrainProgress(10, 0, bar=True, console=Console(file=io.StringIO())) as progress:
        progress.evaluating()
        progress.evaluated(0, EVALUATION)
        progress.metrics(1, STEP)
    assert caplog.messages == [
        "evaluating",
        "step 0/10  held-out pairs: loss 0.1250  accuracy 0.50",
        "step 1/10  loss 0.2500  accuracy 1.00  8.00 pairs/s",
    ]

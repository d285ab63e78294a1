"""On-policy rounds: the model's own answers, labeled, become the pairs that it is trained on."""

from attnpo_jax.iterate.labeler import Answer, Group, Label, Labels, Task, register
from attnpo_jax.iterate.stage import iterate

__all__ = ["Answer", "Group", "Label", "Labels", "Task", "iterate", "register"]

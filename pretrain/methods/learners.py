"""What the training loop asks of a method, and several students that share one frozen teacher.

A method has `targets(parts, temperature, watch=)` for all parts of a step. It is, or has, learners:
each with a `student` that is optimized, whose learning rate decays over `depth` layers; `losses`
of one part; `update_teacher(momentum)`; `submodules()` whose gradients are clipped apart; and
`save(folder)`, which leaves `file_name`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pretrain.batch import Batch


class SeveralStudents(nn.Module):
    """Students that learn from one teacher, whose outputs are computed once a step.

    Each follows the run that it would be alone: nothing passes from one to another.
    """

    def __init__(self, students: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleDict(students)

    @property
    def first(self) -> Any:
        """The student that asks the teacher for all."""
        return next(iter(self.students.values()))

    def targets(self, parts: Sequence[Batch], temperature: float, *, watch: bool = False) -> Any:
        """What the teacher says of all parts of a step."""
        return self.first.targets(parts, temperature, watch=watch)


def learners(method: nn.Module) -> dict[str, Any]:
    """The learners of a method by name; a single one has the empty name."""
    if isinstance(method, SeveralStudents):
        return dict(method.students.items())
    return {"": method}

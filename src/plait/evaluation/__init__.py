"""What a choice costs on real text: tasks, their results and pictures."""

from __future__ import annotations

from plait.evaluation.long import Outcome, Report, evaluate
from plait.evaluation.long_tasks import TASKS, Case, Material, Task, find_tasks

__all__ = ["TASKS", "Case", "Material", "Outcome", "Report", "Task", "evaluate", "find_tasks"]

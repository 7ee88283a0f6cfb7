"""torch.distributed.checkpoint's plan of who writes what, made once for as long as the state's layout stays the same.

Planning thousands of tensors takes the interpreter's lock for seconds, from the trainer too. So a rank whose layout is
that of the save before sends an empty plan, which stands for the one that it sent then; when all do, rank 0 answers
with empty plans, and each rank writes as it did then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

_AS_BEFORE = SavePlan([], usable=False)


class SavePlanner(DefaultSavePlanner):
    """For the saves of one run, one after the other: `dcp.save({STATE: tensors}, planner=...)`.

    After a save that failed, `forget` is called on every rank; after each, `release`.
    """

    STATE = "state"  # one entry, for dcp.save looks at each of them

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.forget()

    def forget(self) -> None:
        """Plan the next save anew."""
        self._layout: list[tuple] | None = None
        self._all_plans: list[SavePlan] = []
        self._last_metadata: Metadata | None = None
        self._final: SavePlan | None = None

    def release(self) -> None:
        """Keep nothing of the state that was saved."""
        self.state_dict = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict[self.STATE], storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        layout = _layout(self.state_dict)
        if layout == self._layout:
            return _AS_BEFORE
        self._layout = layout
        return super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        if self._last_metadata is not None and not any(plan.usable for plan in all_plans):
            return [_AS_BEFORE] * len(all_plans), self._last_metadata
        if not self._all_plans and not all(plan.usable for plan in all_plans):
            raise RuntimeError("a rank repeats a plan that rank 0 has forgotten")  # this save fails, and all forget
        before = self._all_plans or all_plans
        self._all_plans = [plan if plan.usable else old for plan, old in zip(all_plans, before, strict=True)]
        plans, self._last_metadata = super().create_global_plan(self._all_plans)
        return plans, self._last_metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if new_plan.usable:
            self._final = new_plan
        assert self._final is not None
        return super().finish_plan(replace(self._final, storage_data=new_plan.storage_data))


def _layout(state: Mapping[str, Tensor]) -> list[tuple]:
    return [
        (name, tensor.dtype, tensor.shape, tensor._spec if isinstance(tensor, DTensor) else None)
        for name, tensor in state.items()
    ]

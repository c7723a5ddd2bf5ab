"""The state of a role: who may change it, and what each state does to work."""

import asyncio

import pytest

from understudy.rpc import RoleControl, ServiceError
from understudy.rpc.control import DRAINING, PAUSED, SERVING, STARTING


def control_after(*calls: str) -> RoleControl:
    """A control on which methods were called in order."""
    control = RoleControl("actor")
    for call in calls:
        getattr(control, call)()
    return control


@pytest.mark.parametrize(
    ("calls", "state"),
    [
        ([], STARTING),
        (["resume"], STARTING),
        (["serving"], SERVING),
        (["serving", "resume"], SERVING),
        (["serving", "pause"], PAUSED),
        (["serving", "pause", "pause", "resume"], SERVING),
        (["pause", "resume"], STARTING),
        (["pause", "resume", "serving"], SERVING),
        (["pause", "serving"], PAUSED),
        (["pause", "serving", "resume"], SERVING),
        (["serving", "drain", "pause"], DRAINING),
        (["drain", "serving"], DRAINING),
        (["serving", "pause", "drain"], DRAINING),
    ],
)
async def test_only_a_process_that_is_ready_takes_work(calls: list[str], state: int) -> None:
    control = control_after(*calls)
    assert control.state == state
    admitted = asyncio.create_task(control.admitted())
    await asyncio.sleep(0)
    if state == SERVING:
        control.admit()
        assert await admitted
    else:
        with pytest.raises(ServiceError) as refused:
            control.admit()
        assert refused.value.retry_after_seconds
        assert admitted.done() == (state == DRAINING)
    admitted.cancel()


def test_a_process_that_drains_is_not_resumed() -> None:
    with pytest.raises(ServiceError, match="DRAINING: the actor is stopping"):
        control_after("serving", "drain", "resume")

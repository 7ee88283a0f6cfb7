"""The poison itself: it shows what was not written, and leaves device contexts as they were."""

import torch


def test_shows_what_was_not_written():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()


def test_device_contexts_still_intercept_the_real_function():
    with torch.device("meta"):
        assert torch.empty.__wrapped__(1).is_meta

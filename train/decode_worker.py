"""A decoding worker: the process behind `decode_workers.DecodeWorkers`.

    trainer -> worker   (job, ClipRequest, offset, bytes)      decode into memory[offset : offset + bytes]
    worker -> trainer   (job, "done", height, width)           frames lie there as uint8 [T, height, width, 3]
                        (job, "skip", reason)                  the file cannot be used
                        (job, "fault", what)                   anything else that went wrong: a mistake of ours

It imports no torch, unless torchcodec decodes, and is started as a program of its own, not forked: its start-up takes a
quarter of a second, and it shares nothing with the trainer but the memory it is given.  It ends when the trainer's end
of the connection closes, and the kernel kills it when the trainer dies while a decoder does not return.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from functools import partial
from multiprocessing.connection import Connection

import numpy as np

from opensora_fast.errors import UserError
from opensora_fast.train.dataset import ClipRequest, read_request
from opensora_fast.train.decode_watch import StatusBoard
from opensora_fast.video_decoder import DecoderName
from opensora_fast.video_io import OnStage

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """arguments: worker, workers, trainer's process id, descriptors of connection, memory and board, bytes, decoder."""
    worker, workers, trainer, connection_fd, memory_fd, board_fd, bytes = map(int, arguments[:-1])
    decoder: DecoderName = "torchcodec" if arguments[-1] == "torchcodec" else "PyAV"
    _die_with(trainer)
    connection = Connection(connection_fd)
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all of it now: no page fault while decoding
    memory = np.frombuffer(mmap.mmap(memory_fd, bytes, flags=flags), np.uint8)
    board = StatusBoard(workers, board_fd)
    try:
        while True:
            job, request, offset, size = connection.recv()
            board.begin(worker, job)
            answer = decode(request, memory[offset : offset + size], decoder, partial(board.enter, worker))
            connection.send((job, *answer))
            board.finish(worker)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer has closed the connection, or is gone


def decode(request: ClipRequest, slot: np.ndarray, decoder: DecoderName, on_stage: OnStage) -> tuple:
    """Fill `slot` (uint8) with the clip, or say what was wrong: the part of an answer behind the job."""
    shape = (request.frames, request.height, request.width)

    def place(frames: int, height: int, width: int) -> np.ndarray:
        nonlocal shape
        if frames * height * width * 3 <= len(slot):
            shape = (frames, height, width)  # the collator cuts the centre out while it reads
        return slot[: 3 * np.prod(shape)].reshape(*shape, 3)

    try:
        read_request(request, decoder=decoder, allocate=place, on_stage=on_stage)
    except UserError as error:
        return "skip", str(error)
    except Exception as error:
        return "fault", f"{request.path}: {type(error).__name__} while decoding: {error}"
    return "done", *shape[1:]


def _die_with(trainer: int) -> None:
    """Ask the kernel to kill this process when the thread that started it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:  # it was gone already
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])

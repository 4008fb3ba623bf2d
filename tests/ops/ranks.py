"""Several ranks on one machine: processes that run the same function and report to the test."""

import datetime
import os
import queue
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sft_kernels._backend import Unavailable

from ..csrc import host

_TIMEOUT = datetime.timedelta(seconds=60)


class Ranks:
    """``ranks(function, *args)`` runs ``function(*args)`` on each of ``count`` gloo ranks, seeded alike, and returns
    what they returned, in their order; where one raises, so does this. ``function`` belongs to a module."""

    def __init__(self, count, folder):
        if not host.why_not():
            host.library()  # built once, and not by every rank
        context = mp.get_context("spawn")
        self._in, self._out = [context.Queue() for _ in range(count)], context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(i, count, str(folder / "store"), inbox, self._out), daemon=True)
            for i, inbox in enumerate(self._in)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function, *args):
        for inbox in self._in:
            inbox.put((function, args))
        found = dict(self._report() for _ in self._in)
        for text, _ in found.values():
            if text and "Unavailable: impl='cuda'" in text:
                raise Unavailable(text.strip().splitlines()[-1])  # which skips the test
        failed = {rank: text for rank, (text, _) in found.items() if text}
        assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
        return [found[rank][1] for rank in sorted(found)]

    def _report(self):
        while True:
            try:
                return self._out.get(timeout=1)
            except queue.Empty:
                ended = [process.exitcode for process in self._processes if not process.is_alive()]
                assert not ended, f"a rank ended with status {ended[0]}"

    def close(self):
        for inbox in self._in:
            inbox.put(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank, count, store, inbox, outbox):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=_TIMEOUT)
    with host.on_cpu():
        while (job := inbox.get()) is not None:
            function, args = job
            torch.manual_seed(0)
            try:
                outbox.put((rank, (None, function(*args))))
            except BaseException:
                outbox.put((rank, (traceback.format_exc(), None)))
    dist.destroy_process_group()

"""What keeping 256 sequences mapped costs the host at each step of an engine.

- idle: a step with nothing to map. lengths is an array (NumPy, or a torch tensor on the CPU) or a
  mapping of sequences; every step makes each sequence one token longer, and making lengths is not
  timed. That no backend call is made is counted in a run of its own, through a wrapper.
- decode: each step makes all sequences one token longer, and a stand-in for the model follows: a
  kernel of a fixed time on the current stream, and the host's wait for it. That is the time the
  background thread has between two steps. Most of it is measured with 1 ms, less than a model of
  this shape takes to read its weights, so that the thread has less time than in earnest.
  spread: random lengths, so that in every step some sequences reach a new page. together: all of
  one length, so that all reach it in the same step. cold: pages are created; warm: the pool has
  them. waited: steps that called the driver or waited for the thread.
- crossing: one step in which so many sequences reach a new page at once, without the background
  thread and with nothing mapped ahead.
- arrivals: 32 prompts, allocated one after the other beside 224 live sequences. adopt: their slots
  were freed and are still mapped.

call: until the function returns; ready: until the current stream has done what the call gave it
(new pages are cleared there). busy: kernels that read and write memory run all the while on another
stream. The floor is the driver's own time for the same pages, and does not count clearing them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from ..common import Context, describe_layout, release_cache
from .allocators import SEQUENCES, backend_for, layout_for
from .arrivals import run_arrivals
from .busy import Busy
from .crossing import run_crossing
from .decode import run_decode
from .driver import driver_costs
from .idle import run_idle


def run(context: Context) -> dict[str, object]:
    layout = layout_for(context)
    busy = Busy(context) if context.cuda else None
    page_bytes = backend_for(context).page_bytes
    with _no_garbage_collection():
        driver = driver_costs(context, busy)
        idle = run_idle(context, busy)
        crossing = run_crossing(context, busy, driver)
        arrivals = run_arrivals(context, busy)
        del busy
        release_cache(context)
        decode = run_decode(context)
    return {
        "what": __doc__,
        "sequences": SEQUENCES,
        "layout": describe_layout(layout),
        "page_bytes": page_bytes,
        "tokens_per_page": layout.tokens_per_page(page_bytes),
        "idle": idle,
        "driver_page": driver,
        "crossing": crossing,
        "arrivals": arrivals,
        "decode": decode,
    }


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

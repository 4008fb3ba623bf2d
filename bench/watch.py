"""The GPU's clock, power and reasons to slow down, read beside a measurement."""

import statistics
import subprocess
import threading

FIELDS = {  # of nvidia-smi, and their names here
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watt",
    "temperature.gpu": "celsius",
}
REASONS = "clocks_event_reasons.active"  # a bit mask
COMMAND = (
    "nvidia-smi",
    f"--query-gpu={','.join([*FIELDS, REASONS])}",
    "--format=csv,noheader,nounits",
)
# Bits of the mask (NVML, nvmlClocksEventReasons). Idle is none: it stands where a sample fell between two kernels.
BITS = {
    0x2: "applications' clock setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display's clock setting",
}


class Watch:
    """Reads the GPU every ``interval`` seconds on a thread, until the block ends."""

    def __init__(self, interval=0.5):
        self.interval, self.lines, self.reason = interval, [], None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()

    def _read(self):
        while True:
            try:
                done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=10)
            except (OSError, subprocess.TimeoutExpired) as error:
                self.reason = f"{type(error).__name__}: {error}"
                return
            if done.returncode:
                self.reason = (done.stdout + done.stderr).strip()[:200] or f"exit {done.returncode}"
                return
            self.lines += done.stdout.strip().splitlines()[:1]
            if self._over.wait(self.interval):
                return

    def summary(self):
        """Returns ``{field: [least, median, most], "slowed_by": [reason, …]}``, or ``{"absent": why}``."""
        samples = [line.split(", ") for line in self.lines]
        samples = [sample for sample in samples if len(sample) == len(FIELDS) + 1]
        if not samples:
            return {"absent": self.reason or "nvidia-smi said nothing"}
        found = {}
        for at, name in enumerate(FIELDS.values()):
            numbers = [float(sample[at]) for sample in samples if sample[at].replace(".", "", 1).isdigit()]
            if numbers:
                found[name] = [min(numbers), statistics.median(numbers), max(numbers)]
        mask = 0
        for sample in samples:
            mask |= int(sample[-1], 16) if sample[-1].startswith("0x") else 0
        found["slowed_by"] = [reason for bit, reason in BITS.items() if mask & bit]
        return found

"""Interrupt runs in the middle."""

from rarefy.calibration import resume


def stopping(monkeypatch, writes):
    """Interrupt a run after so many stops are on disk."""
    real, count = resume.ResumeState.write, [0]

    def write(self, stop, entry):
        real(self, stop, entry)
        count[0] += 1
        if count[0] == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.ResumeState, "write", write)

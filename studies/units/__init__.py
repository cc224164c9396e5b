"""Whose routing a weight should look at, on fresh models; protocol.md says what is compared, and was there first.

    python -m studies.units --output runs/units --jobs 2 --publish studies/units
    python -m studies.units --output runs/units --report-only --publish studies/units

Every finished arm is one file, and is kept in `arms/`: a run that was stopped goes on where it was, on any machine.
Models, arms and corpora are those of `studies.method_study`, with other seeds.
"""

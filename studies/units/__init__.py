"""Whose routing a weight should look at, on fresh models; protocol.md says what is compared, and was there first.

    python -m studies.units --output runs/units --jobs 2
    python -m studies.units --output runs/units --report-only --publish studies/units

Every finished arm is one file: a run that was stopped goes on where it was. Models, arms and corpora are those of
`studies.method_study`, with other seeds.
"""

"""What TRACE's weights buy, and with which settings: many arms on independently pre-trained tiny models.

    python -m studies.method_study --output runs/study --models 12 --jobs 2
    python -m studies.method_study --output runs/study --report-only
    python -m studies.method_study --output runs/quick --quick

Every finished arm of a model is one JSON file in the output folder; a run that was stopped goes on where it was, and
`--report-only` writes the tables of what is there.
"""

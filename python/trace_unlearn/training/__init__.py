"""The unlearning step: TraceTrainer, its objectives, what a run keeps. Imports the rooms before it, up to fusion."""

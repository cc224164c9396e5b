import os

# No test asks a model hub. The hub client reads this when it is imported, which the collection of any file may do.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

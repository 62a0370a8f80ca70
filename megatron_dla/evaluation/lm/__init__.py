"""`dla eval lm`: language models compared on text, questions and generated long-context tasks.

`models` loading · `items` what a task is made of · `scoring` log-probabilities and greedy continuations in batches ·
`journal` finished items on disk · `runner` models x tasks · `report` tables, JSON and figure · `cli` the command.
Tasks: `perplexity` · `questions` · `harness` lm-eval · `retrieval` MQAR and key-value · `generated` prompts of a length
· `ruler` with `material` words and haystacks, `needles`, `counting`, `answering`.
"""

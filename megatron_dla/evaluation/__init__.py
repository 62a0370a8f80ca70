"""Evaluation of δ-mem with its controls: recall with the context removed, perplexity cost, LoCoMo.

`recall` generated stories · `scoring` conditions, states, answers · `tasks` recall and perplexity · `locomo` (with
`stemming`) · `table` paired results · `stats` bootstrap · `report` JSON and picture · `cli` the command `dla eval`.
"""

"""Evaluation of δ-mem against its controls: recall with the context removed, perplexity on plain text, LoCoMo.

`recall` generated stories · `scoring` conditions, states, answers · `tasks` recall and perplexity · `locomo` · `table`
paired results · `stats` bootstrap · `report` JSON and figure · `cli` the command `dla eval`.
"""

"""Text to tokenizer to tokenised WebDataset shards with a checksummed index, and their verification.

Modules: `sources` (documents from files), `tokenizer` (train and use), `tokenise` (documents to tokens), `shards`
(build), `index` (the index file), `verify`, `cli` (`dla data ...`). Nothing is imported
here, so that reading an index needs neither sentencepiece nor webdataset.
"""

"""Text to tokenizer to tokenised WebDataset shards with a checksummed index, and their verification.

Modules: `listing` and `readers` (files and their records), `sources` (documents), `encoders` and `tokenizer` (train and
use), `tokenise` and `spool` (documents to tokens on disk), `layout` and `shards` (build), `verify`, `cli`. Nothing is
imported here, so that reading an index does not need sentencepiece.
"""

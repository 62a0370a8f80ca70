"""Launchers: build command lines, start processes and watch them; no training code."""

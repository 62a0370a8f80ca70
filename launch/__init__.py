"""Launchers: build command lines and watch processes; no training code."""

"""Classifying texts: a head of classes on a GPT."""

"""The command line's verbs: a file a verb, with the options they share and the checks before a model is loaded."""

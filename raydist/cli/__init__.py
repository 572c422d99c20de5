"""The verbs. Each module is one verb: ``HELP``, ``configure(parser)`` and ``run(args)``; heavy imports live inside ``run``."""

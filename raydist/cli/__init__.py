"""The verbs. Each module is one verb: ``configure(parser)`` and ``run(args)``; heavy imports live inside ``run``."""

from hypothesis import settings

settings.register_profile("shared", deadline=None)  # a busy machine is no error of ours
settings.load_profile("shared")

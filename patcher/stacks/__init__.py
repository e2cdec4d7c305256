"""The stacks of stopped threads and of coroutines: is any of these functions live?"""

"""What users pass by mistake to the public functions, and the errors that they get.

Each case is a call that is wrong in one argument. It must raise the documented
exception, which names the argument, shows what was received and says what to do, and
leave the models unchanged.

- `world`: the models and data that all calls share, so that little is compiled;
- `calls`: a valid call of each public function;
- `case`: a wrong call, and functions that make several of them;
- `cases`: all of them, from a file for each group of functions or arguments.
"""

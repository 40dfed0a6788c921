// Module entry of flowattn._C. Schemas live in python/flowattn/_library.py, so that the ops exist with or without this
// library; each csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu registers its own implementations.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

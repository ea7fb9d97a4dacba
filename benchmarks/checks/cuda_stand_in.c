// What Triton wants of libcuda.so.1 where there is no GPU: a module is whatever it is given, and a launch is handed to
// a listener instead of a device.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { SHARED_BYTES = 97, PROCESSORS = 16, WARP = 10 };  // of cuDeviceGetAttribute
enum { MOST_THREADS = 0 };                               // of cuFuncGetAttribute

static int (*listener)(const void* config, void** arguments);

void listen_with(int (*function)(const void*, void**)) { listener = function; }

int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
    return listener(config, arguments);
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == SHARED_BYTES ? 227 << 10 : attribute == PROCESSORS ? 132 : attribute == WARP ? 32 : 1 << 16;
    return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
    *value = attribute == MOST_THREADS ? 1024 : 0;
    return 0;
}
int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
    memcpy(value, &pointer, sizeof(pointer));
    return 0;
}
int cuGetErrorString(int error, const char** text) {
    *text = "the listener failed";
    return 0;
}

static int give(void** handle) {
    *handle = (void*)1;
    return 0;
}
int cuCtxGetCurrent(void** context) { return give(context); }
int cuDevicePrimaryCtxRetain(void** context, int device) { return give(context); }
int cuModuleLoadData(void** module, const void* image) { return give(module); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return give(function); }

int cuDeviceGet(int* device, int number) {
    *device = number;
    return 0;
}
int cuDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}
int cuCtxGetLimit(size_t* value, int limit) {
    *value = 0;
    return 0;
}
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { return 1; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }

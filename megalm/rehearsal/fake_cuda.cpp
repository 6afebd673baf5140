// A CUDA device guard and hooks that compute nothing, so that autograd accepts fake tensors on "cuda". Loaded before
// torch's Python module, which looks for the hooks once.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using namespace c10;

constexpr DeviceIndex kDevices = 16;  // autograd starts a thread for each; Python says how many the node has
thread_local DeviceIndex current = 0;

Device current_device() {
  return Device(kCUDA, current);
}

Stream default_stream(Device device) {
  return Stream(Stream::DEFAULT, device.has_index() ? device : current_device());
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  Device getDevice() const override { return current_device(); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  Device exchangeDevice(Device device) const override {
    Device before = current_device();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  // One stream for all work: nothing runs, so nothing is ordered.
  Stream getStream(Device device) const override { return default_stream(device); }
  Stream getDefaultStream(Device device) const override { return default_stream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return default_stream(device); }
  Stream getNewStream(Device device, int) const override { return default_stream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

c10::impl::DeviceGuardImplRegistrar registered(kCUDA, new Guard());

}  // namespace

// After torch is imported: a torch with CUDA registers its own guard then, and the last one counts.
extern "C" void fake_cuda_register_guard() { c10::impl::DeviceGuardImplRegistrar again(kCUDA, new Guard()); }

// Of the calling thread, for Python.
extern "C" int fake_cuda_current_device() { return current; }
extern "C" void fake_cuda_set_device(int index) { current = static_cast<DeviceIndex>(index); }

namespace at {

struct CUDAHooks final : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, current); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// torch asks for them by this name; preferred to those of a torch with CUDA, which come later.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)

}  // namespace at

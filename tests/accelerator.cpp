// A device for tests that is neither a CPU nor a CUDA GPU, and has what Apple's GPUs have:
//   - no float64: making such a tensor raises;
//   - data_ptr() is no address: it is the handle of a storage, plus an offset;
//   - backward() runs its nodes on a thread of the device.
// Its memory is the host's. What is not here runs on the CPU, on copies.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>

namespace {

using at::Tensor;
constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);

// What a storage's pointer points to. One lies beside the other, and is used once.
struct Handle {
  char* memory;
};

struct HandleAllocator final : c10::Allocator {
  Handle handles[1 << 20];
  std::atomic<int> n_used = 0;

  c10::DataPtr allocate(size_t n_bytes) override {
    int i = n_used++;
    TORCH_CHECK(i < 1 << 20, "all handles are used");
    handles[i].memory = static_cast<char*>(std::malloc(n_bytes + 1));
    return {&handles[i], &handles[i], &free_memory, DEVICE};
  }
  static void free_memory(void* handle) {
    std::free(static_cast<Handle*>(handle)->memory);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, std::size_t n_bytes) const override {
    std::memcpy(
        static_cast<Handle*>(to)->memory, static_cast<const Handle*>(from)->memory, n_bytes);
  }
};

HandleAllocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, DEVICE);
  }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  bool isAvailable() const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
};

// The same elements, as a tensor of the host.
Tensor on_host(const Tensor& tensor) {
  if (tensor.device().type() != TYPE) {
    return tensor;
  }
  char* memory = static_cast<const Handle*>(tensor.storage().data())->memory;
  return at::from_blob(
      memory + tensor.storage_offset() * tensor.itemsize(),
      tensor.sizes(),
      tensor.strides(),
      [tensor](void*) {},
      tensor.options().device(at::kCPU).requires_grad(false));
}

at::ScalarType served(std::optional<at::ScalarType> asked) {
  auto dtype = c10::dtype_or_default(asked);
  TORCH_CHECK_TYPE(dtype != at::kDouble, "this device has no float64");
  return dtype;
}

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(
    at::IntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &allocator, KEYS, served(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator, KEYS, served(dtype));
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  // As on MPS: a copy to the host is converted on the device.
  if (self.device().type() == TYPE && self.scalar_type() != to.scalar_type()) {
    served(to.scalar_type());
  }
  on_host(to).copy_(on_host(self));
  return to;
}


at::Scalar item(const Tensor& self) {
  return on_host(self).item();
}

const Tensor& resize(
    const Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  if (self.sizes() != sizes) {
    auto larger = empty(sizes, self.scalar_type(), {}, {}, {}, {});
    auto* impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(larger.storage());
    impl->set_storage_offset(0);
    impl->set_sizes_contiguous(sizes);
  }
  return self;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  return copy_from(self, resize(to, self.sizes(), {}), false);
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(other.storage());
  impl->set_storage_offset(other.storage_offset());
  impl->set_sizes_and_strides(other.sizes(), other.strides());
  return self;
}

void on_copies(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  at::native::cpu_fallback(operation, stack);
}

const bool has_hooks = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  c10::SetAllocator(TYPE, &allocator);
  return true;
}();

} // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("resize_", &resize);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_copies>());
}

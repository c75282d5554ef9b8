// Work on a stream of its own, beside what the thread's own stream does.
#include "guarded.h"

#include <c10/core/Event.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct Beside {
  const c10::impl::DeviceGuardImplInterface* guard;
  c10::Stream main, own;

  explicit Beside(c10::Device device)
      : guard(c10::impl::getDeviceGuardImpl(device.type())), main(guard->getStream(device)), own(stream(guard, device)) {}

  // One per process, for its one training thread and device.
  static c10::Stream stream(const c10::impl::DeviceGuardImplInterface* guard, c10::Device device) {
    static auto* stream = new c10::Stream(guard->getStreamFromGlobalPool(device));
    return *stream;
  }

  void wait(const c10::Stream& waits, const c10::Stream& other) const {
    c10::Event event(guard->type());
    event.record(other);
    event.block(waits);
  }
};

}  // namespace

extern "C" {

// Beside the stream that is current.
char* pt_beside_new(int8_t device, Beside** out) {
  return guarded([&] { *out = new Beside({c10::kCUDA, device}); });
}

// From here on this thread queues its work beside that stream, after all that is queued there.
char* pt_beside_begin(Beside* beside) {
  return guarded([&] {
    beside->wait(beside->own, beside->main);
    beside->guard->exchangeStream(beside->own);
  });
}

// Back to the stream that was current.
char* pt_beside_end(Beside* beside) {
  return guarded([&] { beside->guard->exchangeStream(beside->main); });
}

// That stream waits for the work beside it.
char* pt_beside_join(Beside* beside) {
  return guarded([&] {
    std::unique_ptr<Beside> own(beside);
    own->guard->exchangeStream(own->main);
    own->wait(own->main, own->own);
  });
}

}  // extern "C"

// Both directions of an LSTM layer at the same time on a GPU, with cuDNN, forward and backward. A cuDNN handle runs one
// call after another, whatever the streams, and there is one handle per thread: the reverse direction runs on a thread
// and a stream of its own.
#include "guarded.h"

#include <ATen/ops/_cudnn_rnn.h>
#include <ATen/ops/_cudnn_rnn_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace {

// The exception that `work` throws, or null.
template <typename Work>
std::exception_ptr failure_of(Work work) {
  try {
    work();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

// A thread that works beside its caller, on a stream of its own.
class Helper {
 public:
  explicit Helper(at::Device device)
      : guard_(c10::impl::getDeviceGuardImpl(device.type())), device_(device), stream_(guard_->getStreamFromGlobalPool(device)) {
    auto* hears = c10::WarningUtils::get_warning_handler();
    std::thread([this, hears] {
      c10::WarningUtils::set_warning_handler(hears);
      run();
    }).detach();
  }

  // Runs `other` here and `own` on the helper thread, both after all work queued on this thread's stream; work queued
  // on it later waits for both.
  template <typename Own, typename Other>
  void beside(Own own, Other other) {
    std::lock_guard<std::mutex> alone(turn_);
    auto main = guard_->getStream(device_);
    c10::Event before(device_.type()), after(device_.type());
    before.record(main);
    before.block(stream_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = own;
    }
    changed_.notify_all();
    auto mine = failure_of(other);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !work_; });
    auto theirs = std::exchange(failed_, nullptr);
    after.record(stream_);
    after.block(main);
    for (auto& failed : {mine, theirs}) {
      if (failed) std::rethrow_exception(failed);
    }
  }

 private:
  void run() {
    c10::NoGradGuard no_grad;
    guard_->setDevice(device_);
    guard_->exchangeStream(stream_);
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return bool(work_); });
      auto work = work_;
      lock.unlock();
      auto failed = failure_of(work);
      lock.lock();
      failed_ = failed;
      work_ = nullptr;
      changed_.notify_all();
    }
  }

  const c10::impl::DeviceGuardImplInterface* guard_;
  at::Device device_;
  c10::Stream stream_;
  std::mutex turn_, mutex_;
  std::condition_variable changed_;
  std::function<void()> work_;
  std::exception_ptr failed_;
};

// One per process, for its one training thread and device. When that thread records, this stream is recorded too.
Helper& helper(at::Device device) {
  static auto* helper = new Helper(device);
  return *helper;
}

constexpr int64_t LSTM = 2;  // in cudnnRNNMode_t

// One direction of one layer, over [T, B, E].
struct Direction {
  std::vector<at::Tensor> weights;
  at::Tensor x, zero, y, reserve, buffer;

  // `buffer` has the weights in cuDNN's layout.
  void forward(bool train) {
    auto hidden = weights[1].size(1);
    std::tie(y, std::ignore, std::ignore, reserve, std::ignore) =
        at::_cudnn_rnn(x, weights, 4, buffer, zero, zero, LSTM, hidden, 0, 1, false, 0.0, train, false, {}, {});
  }

  // The gradients of the input, if `to_x`, and of the weights.
  std::pair<at::Tensor, std::vector<at::Tensor>> backward(const at::Tensor& gradient, bool to_x, bool again) {
    auto hidden = weights[1].size(1);
    auto done = at::_cudnn_rnn_backward(
        x, weights, 4, buffer, zero, zero, y, gradient, {}, {}, LSTM, hidden, 0, 1, false, 0.0, true, false, {}, {},
        again ? reserve.clone() : reserve, {to_x, false, false, true});
    return {std::get<0>(done), std::get<3>(done)};
  }
};

// x [T, B, F] with the positions of each sentence reversed: all, or by the self-inverse permutation `places` [T * B].
at::Tensor turned(const at::Tensor& x, const at::Tensor& places) {
  return places.defined() ? x.flatten(0, 1).index_select(0, places).view(x.sizes()) : x.flip({0});
}

struct BothDirections : torch::autograd::Function<BothDirections> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& w0, const at::Tensor& w1, const at::Tensor& w2,
      const at::Tensor& w3, const at::Tensor& w4, const at::Tensor& w5, const at::Tensor& w6, const at::Tensor& w7,
      const std::vector<at::Tensor>& buffers, const std::optional<at::Tensor>& turn, bool train) {
    auto places = turn.value_or(at::Tensor());
    Direction one, other;
    one.weights = {w0, w1, w2, w3}, other.weights = {w4, w5, w6, w7};
    one.zero = other.zero = at::zeros({1, x.size(1), w1.size(1)}, x.options());
    one.x = x;
    one.buffer = buffers[0], other.buffer = buffers[1];
    at::Tensor reverse;
    helper(x.device()).beside(
        [&] {
          other.x = turned(x, places);
          other.forward(train);
          reverse = turned(other.y, places);
        },
        [&] { one.forward(train); });
    context->save_for_backward(
        {x, w0, w1, w2, w3, w4, w5, w6, w7, places, one.zero, one.y, one.reserve, one.buffer, other.x, other.y, other.reserve,
         other.buffer});
    return at::cat({one.y, reverse}, -1);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto hidden = saved[2].size(1);
    auto part = [&](size_t first, const at::Tensor& x, size_t rest) {
      Direction direction;
      direction.weights.assign(saved.begin() + first, saved.begin() + first + 4);
      direction.x = x, direction.zero = saved[10];
      direction.y = saved[rest], direction.reserve = saved[rest + 1], direction.buffer = saved[rest + 2];
      return direction;
    };
    auto one = part(1, saved[0], 11), other = part(5, saved[14], 15);
    bool to_x = context->needs_input_grad(0), again = torch::autograd::get_current_graph_task_keep_graph();
    auto of = [&](int64_t direction) { return gradients[0].narrow(-1, direction * hidden, hidden); };
    std::pair<at::Tensor, std::vector<at::Tensor>> forward, reverse;
    helper(saved[0].device()).beside(
        [&] {
          reverse = other.backward(turned(of(1), saved[9]), to_x, again);
          if (to_x) reverse.first = turned(reverse.first, saved[9]);
        },
        [&] { forward = one.backward(of(0).contiguous(), to_x, again); });
    torch::autograd::variable_list all{to_x ? forward.first.add_(reverse.first) : at::Tensor()};
    for (auto* weights : {&forward.second, &reverse.second}) all.insert(all.end(), weights->begin(), weights->end());
    all.resize(12);
    return all;
  }
};

}  // namespace

extern "C" {

// x [T, B, E], contiguous on a GPU, to [T, B, 2 * H]. weights: four per direction, in the order of torch.lstm; buffers:
// the memory of each direction's weights, in cuDNN's layout. `places` [T * B]: the flat position that the reverse
// direction reads at each position; null to reverse all.
char* pt_both_directions(Handle x, const Handle* weights, const Handle* buffers, Handle places, bool train, Handle* out) {
  auto grad_mode = c10::GradMode::is_enabled();
  return guarded([&] {
    c10::AutoGradMode as_before(grad_mode);
    auto w = list(weights, 8);
    auto turn = places ? std::optional<at::Tensor>(*places) : std::nullopt;
    *out = new at::Tensor(
        BothDirections::apply(*x, w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], list(buffers, 2), turn, train));
  });
}

}  // extern "C"

// Labels sentences with an exported model whose tokens are words between white space: predict model.pt < sentences.
// Needs libtorch alone; of letters only those of ASCII are made lower case.
#include <torch/script.h>

#include <cctype>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>

int main(int, char** arguments) {
  torch::jit::ExtraFilesMap files{{"vocabulary.txt", ""}, {"labels.txt", ""}, {"polytask.json", ""}};
  auto model = torch::jit::load(arguments[1], torch::kCPU, files);
  const bool lowercase = files["polytask.json"].find("\"lowercase\": true") != std::string::npos;
  const bool fold_digits = files["polytask.json"].find("\"fold_digits\": true") != std::string::npos;
  // Bytes of a word that the model reads; null where it reads none.
  const auto limit = files["polytask.json"].find("\"max_bytes\": ") + std::string("\"max_bytes\": ").size();
  const size_t max_bytes = std::strtoul(files["polytask.json"].c_str() + limit, nullptr, 10);
  std::map<std::string, int64_t> ids;
  std::istringstream vocabulary(files["vocabulary.txt"]);
  for (std::string word; std::getline(vocabulary, word);) ids.emplace(word, ids.size());
  // A line a label, `task <tab> label`, in the order of the tasks and of the label ids.
  std::vector<std::pair<std::string, std::vector<std::string>>> tasks;
  std::istringstream labels(files["labels.txt"]);
  for (std::string task, label; std::getline(labels, task, '\t') && std::getline(labels, label);) {
    if (tasks.empty() || tasks.back().first != task) tasks.push_back({task, {}});
    tasks.back().second.push_back(label);
  }
  torch::NoGradGuard no_grad;
  for (std::string line; std::getline(std::cin, line);) {
    std::vector<int64_t> tokens;
    std::vector<std::string> spelled;
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      spelled.push_back(word.substr(0, max_bytes));
      for (char& c : word) {
        if (lowercase) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
        if (fold_digits && std::isdigit(static_cast<unsigned char>(c))) c = '0';
      }
      auto found = ids.find(word);
      tokens.push_back(found == ids.end() ? ids.at("[UNK]") : found->second);
    }
    if (tokens.empty()) {
      std::cout << "{}\n";
      continue;
    }
    auto input = torch::tensor(tokens).unsqueeze(0);
    std::vector<torch::IValue> inputs{input, torch::tensor({static_cast<int64_t>(tokens.size())})};
    if (max_bytes > 0) {
      // [1, T, L]: each byte plus 1, with 0 beyond a word's end.
      auto bytes = torch::zeros({1, static_cast<int64_t>(tokens.size()), static_cast<int64_t>(max_bytes)}, torch::kInt64);
      for (size_t t = 0; t < spelled.size(); t++)
        for (size_t i = 0; i < spelled[t].size(); i++)
          bytes[0][t][i] = static_cast<unsigned char>(spelled[t][i]) + 1;
      inputs.push_back(bytes);
    }
    auto output = model.forward(inputs).toGenericDict();
    for (size_t i = 0; i < tasks.size(); i++) {
      auto best = output.at(tasks[i].first + ".labels").toTensor().view(-1);
      std::cout << (i == 0 ? "{\"" : ", \"") << tasks[i].first << "\": [";
      for (int64_t j = 0; j < best.size(0); j++)
        std::cout << (j == 0 ? "\"" : ", \"") << tasks[i].second[best[j].item<int64_t>()] << '"';
      std::cout << ']';
    }
    std::cout << "}\n";
  }
}
